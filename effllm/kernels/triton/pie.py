"""Gather cached keys and rotate them to new positions, in one pass.

Maths      out[b, g, t] = R(row[t]) k[b, g, source[t]], R turning the first 2 P channels by pairs: (c, c + P) for "half", (2c, 2c + 1) for
           "interleaved"; the channels behind them pass. Zeros where source[t] < 0.
Layout     k (B, G, S, D) with strides (kb, kg, ks, 1), source int64 (T) or absent (the token itself), row int32 or int64 (T), cos and sin
           fp32 (A, P) contiguous, rounded from fp64 angles; out (B, G, T, D) contiguous.
Bytes      2 * B * G * T * D * element size (the partner channel of a pair comes from L1); 3 flops a value.
Grid       (ceil(T / BT), B * G); BD = D rounded up to a power of two.
Numerics   fp32, one rounding to k's dtype; cos 1 and sin 0 give the input back exactly.
Reference  lowering/pie.py: pie_apply_reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from effllm.lowering.op import OPS, Provider
from effllm.lowering.pie import floats_only


@triton.jit
def pie_kernel(  # type: ignore[no-untyped-def]
    k, source, row, cos, sin, out, T, G, kb, kg, ks, D, P, BT: tl.constexpr, BD: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """BT tokens of one head."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    head = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BD)
    inside = t < T
    s = t.to(tl.int64)
    if source is not None:
        s = tl.load(source + t, mask=inside, other=-1)
    live = (inside & (s >= 0))[:, None] & (c < D)[None, :]
    if HALF:
        first = c < P
        pair = tl.where(first, c, c - P)
        partner = tl.where(first, c + P, c - P)
    else:
        first = c % 2 == 0
        pair = c // 2
        partner = tl.where(first, c + 1, c - 1)
    turning = live & (c < 2 * P)[None, :]
    base = k + head // G * kb + head % G * kg + tl.where(s >= 0, s, 0)[:, None] * ks
    x = tl.load(base + c[None, :], mask=live, other=0.0).to(tl.float32)
    y = tl.load(base + partner[None, :], mask=turning, other=0.0).to(tl.float32)
    table = tl.load(row + t, mask=inside, other=0).to(tl.int64)[:, None] * P + pair[None, :]
    co = tl.load(cos + table, mask=turning, other=1.0)
    si = tl.load(sin + table, mask=turning, other=0.0)
    turned = x * co + tl.where(first[None, :], -y, y) * si
    to = (head * T + t)[:, None] * D + c[None, :]
    tl.store(out + to, turned.to(out.dtype.element_ty), mask=inside[:, None] & (c < D)[None, :])


def pie_apply(k: Tensor, source: Tensor | None, row: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """The launch; arguments and result as the reference's."""
    batch, heads, _, d = k.shape
    tokens = row.shape[0]
    k = k if k.stride(3) == 1 or d == 1 else k.contiguous()
    out = torch.empty(batch, heads, tokens, d, dtype=k.dtype, device=k.device)
    if out.numel() == 0:
        return out
    wide = triton.next_power_of_2(d)
    tile = max(1, 2048 // wide)
    grid = (triton.cdiv(tokens, tile), batch * heads)
    strides = (k.stride(0), k.stride(1), k.stride(2))
    pie_kernel[grid](k, source, row, cos, sin, out, tokens, heads, *strides, d, cos.shape[1], BT=tile, BD=wide, HALF=layout == "half")
    return out


_LIBRARY = torch.library.Library("effllm_triton_pie", "DEF")
_LIBRARY.define("pie_apply(Tensor k, Tensor? source, Tensor row, Tensor cos, Tensor sin, str layout) -> Tensor")
_LIBRARY.impl("pie_apply", pie_apply, "CUDA")


@torch.library.register_fake("effllm_triton_pie::pie_apply")
def _fake(k: Tensor, source: Tensor | None, row: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    return k.new_empty(k.shape[0], k.shape[1], row.shape[0], k.shape[3])


def register() -> None:
    """Add the provider "triton"; calling it again changes nothing."""
    OPS["pie_apply"].register(Provider("triton", "pie_apply", "cuda", "dense", floats_only, torch.ops.effllm_triton_pie.pie_apply, rank=10))
