"""Ops of edited caches: move keys to new positions, and attend to keys that were stored for other positions.

    pie_apply          K'[t] = R(angle[row[t]]) K[source[t]]: one gather and rotation, rounded once (PIE, arXiv 2407.03157)
    rotated_attention  softmax(scale * q . R(angle[row[s]]) k[s] + mask) v, by q . R(a) k = R(-a) q . k: keys are read as stored

cos and sin are (A, R / 2), computed from fp64 angles; row 0 need not be the identity. A rotation by cos 1 and sin 0 is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.lowering.bipolar_linear import provider
from effllm.lowering.op import YES, Op, Problem, Provider, Verdict, define
from effllm.runtime.rotary import rotate

_TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def pie_apply_reference(k: Tensor, source: Tensor | None, row: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """(B, G, T, D) from k (B, G, S, D): token t is token source[t] of k, turned by table row row[t] (int, (T,)); zeros where source[t] < 0.

    Without `source` tokens stay in place. `layout` is "half" or "interleaved".
    """
    if source is not None:
        k = k.index_select(2, source.clamp_min(0))
    out = rotate(k, cos[row], sin[row], layout).to(k.dtype)
    return out if source is None else out.masked_fill((source < 0)[:, None], 0)


def rotated_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, row: Tensor, cos: Tensor, sin: Tensor, layout: str, scale: float
) -> Tensor:
    """Attention (B, H, Q, D) of q over keys k and values v (B, G, S, D), key s turned by table row row[s]; mask bool or additive, 4-D."""
    turned = rotate(k, cos[row], sin[row], layout)  # not rounded to k's dtype
    bias = mask if mask is None or mask.dtype == torch.bool else mask.to(turned.dtype)
    o = torch.nn.functional.scaled_dot_product_attention(
        q.to(turned.dtype), turned, v.to(turned.dtype), bias, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return o.to(q.dtype)


def pie_problem(k: Tensor, pairs: int) -> Problem:
    """What a provider has to know to rotate keys."""
    return Problem("pie_apply", k.shape[1], k.shape[-1], 0, 0, False, dtype=k.dtype, device=k.device.type, detail=(("pairs", pairs),))


def attention_problem(q: Tensor, pairs: int) -> Problem:
    """What a provider has to know to attend to edited keys."""
    m = q.shape[2] if isinstance(q.shape[2], int) else None
    return Problem("rotated_attention", q.shape[1], q.shape[-1], 0, 0, False, m=m, dtype=q.dtype, device=q.device.type, detail=(("pairs", pairs),))


def floats_only(problem: Problem) -> Verdict:
    """The verdict that compiled kernels of both ops share."""
    if problem.dtype not in _TOLERANCE:
        return Verdict(False, f"keys are {problem.dtype}, not float32, bfloat16 or float16")
    return YES


def _apply(k, source, row, cos, sin, layout, kernel):  # type: ignore[no-untyped-def]
    return provider("pie_apply", kernel).call(k, source, row, cos, sin, layout)


def _attention(q, k, v, mask, row, cos, sin, layout, scale, kernel):  # type: ignore[no-untyped-def]
    return provider("rotated_attention", kernel).call(q, k, v, mask, row, cos, sin, layout, scale)


APPLY: Op = define(
    "pie_apply(Tensor k, Tensor? source, Tensor row, Tensor cos, Tensor sin, str layout, str kernel) -> Tensor",
    pie_apply_reference,
    _apply,
    tolerance=_TOLERANCE,
)
ROTATED_ATTENTION: Op = define(
    "rotated_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor row, Tensor cos, Tensor sin, str layout, float scale, str kernel) -> Tensor",
    rotated_attention_reference,
    _attention,
    tolerance=_TOLERANCE,
)
APPLY.register(Provider("reference", "pie_apply", "any", "dense", lambda p: YES, pie_apply_reference, rank=-1))
ROTATED_ATTENTION.register(Provider("reference", "rotated_attention", "any", "dense", lambda p: YES, rotated_attention_reference, rank=-1))
