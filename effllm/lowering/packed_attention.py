"""Op of attention by segments: a flattened batch of prompts, chunks and decoding steps over one row of cached keys, without a mask.

    o[t] = softmax(cap(scale * q[t] k[j]^T)) v[j]    over the keys j that the table gives query t

q (1, H, T, D), k (1, Hk, P, D), v (1, Hk, P, Dv), H a multiple of Hk; table int32 (S, 4) as in runtime/segments.py. `window` > 0: only the
last `window` of a query's keys (sliding-window layers). `softcap` > 0: cap(x) = softcap * tanh(x / softcap). The result is
(1, T, H, Dv), the order in which the output projection reads it; a query in no segment gives zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.lowering.bipolar_linear import provider
from effllm.lowering.op import YES, Op, Provider, define


def packed_attention_reference(q: Tensor, k: Tensor, v: Tensor, table: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    """With a dense (T, P) mask and fp32 sums: what the kernels are compared to."""
    t, j = (torch.arange(n, device=q.device) for n in (q.shape[2], k.shape[2]))
    q_start, q_len, k_start, k_len = (c[None] for c in table.to(torch.int64).unbind(1))
    inside = (t[:, None] >= q_start) & (t[:, None] < q_start + q_len)  # (T, S)
    last = k_start + k_len - q_len + t[:, None] - q_start  # (T, S), inclusive
    first = torch.maximum(k_start, last - window + 1) if window > 0 else k_start.expand_as(last)
    own = lambda x: (x * inside).sum(1, keepdim=True)  # noqa: E731 - segments share no queries: the sum picks
    seen = inside.any(1, keepdim=True) & (j >= own(first)) & (j <= own(last))  # (T, P)
    groups = q.shape[1] // k.shape[1]
    score = q.float() @ k.float().repeat_interleave(groups, 1).transpose(-1, -2) * scale
    if softcap > 0:
        score = softcap * torch.tanh(score / softcap)
    weight = score.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0.0)  # rows of -inf give NaN, and then zeros
    # slots that nobody attends to may hold anything, and 0 * NaN is NaN
    value = v.float().masked_fill(~seen.any(0)[:, None], 0.0).repeat_interleave(groups, 1)
    return (weight @ value).to(q.dtype).transpose(1, 2).contiguous()


@torch.library.custom_op("effllm::packed_attention_loop", mutates_args=())
def _loop(q: Tensor, k: Tensor, v: Tensor, table: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    """torch's attention segment by segment: no mask but a triangle's, nothing between segments is computed. Reads the table on the host."""
    out = q.new_zeros(1, q.shape[2], q.shape[1], v.shape[3])
    for q_start, q_len, k_start, k_len in table.tolist():
        rows = q[:, :, q_start : q_start + q_len]
        first = max(0, k_len - q_len - window + 1) if window > 0 else 0  # keys before this one are out of everybody's window
        n = k_len - first
        keys, values = (x[:, :, k_start + first : k_start + k_len] for x in (k, v))
        behind = torch.arange(n - q_len, n, device=q.device)[:, None] - torch.arange(n, device=q.device)  # how far a key lies back
        seen = None if q_len == 1 else (behind >= 0) & (behind < window) if window > 0 else behind >= 0
        if softcap > 0:
            mine = torch.tensor([[0, q_len, 0, n]])
            part = packed_attention_reference(rows, keys, values, mine, scale, window, softcap)
        else:
            whole = window <= 0 and q_len == n
            part = torch.nn.functional.scaled_dot_product_attention(
                rows, keys, values, None if whole else seen, is_causal=whole and q_len > 1, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            ).transpose(1, 2)
        out[:, q_start : q_start + q_len] = part
    return out


@_loop.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, table: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    return q.new_empty(1, q.shape[2], q.shape[1], v.shape[3])


def _attention(q, k, v, table, scale, window, softcap, kernel):  # type: ignore[no-untyped-def]
    return provider("packed_attention", kernel).call(q, k, v, table, scale, window, softcap)


SEGMENTS: Op = define(
    "packed_attention(Tensor q, Tensor k, Tensor v, Tensor table, float scale, int window, float softcap, str kernel) -> Tensor",
    packed_attention_reference,
    _attention,
    tolerance={torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3},
)
SEGMENTS.register(Provider("reference", "packed_attention", "any", "dense", lambda p: YES, packed_attention_reference, rank=-1))
SEGMENTS.register(Provider("loop", "packed_attention", "any", "dense", lambda p: YES, _loop, rank=0))
