"""Packing Matryoshka pages on a GPU, straight from the ring and the new tokens (see kv_ring.py).

Maths      z = (x - mean) U_r of every token, rounded to the model's dtype; U_r the leading r columns of the key head's basis.
Layout     runtime/caches/matryoshka.py: one record for all heads; sides (2, G + 1) int32 are the running sums of the ranks of keys and of values. Bases
           (G, D, D) and means (G, D) fp32.
Tiles      BT tokens by RP ranks (the largest of all heads, padded), channels in pieces of BD.
Grid       (pages that n tokens can fill, B * G, tiles of keys + tiles of values); programs of pages that stay in the ring leave at once.
Bytes      the page's tokens once, the page once, each program r columns of a basis; D r multiply-adds a token.
Numerics   fp32 products and sums, where the plain-torch encoder sums in fp64: before z is rounded they differ by D roundings of sum |x - mean| |U| at most.
"""

from __future__ import annotations

import triton
import triton.language as tl

from effllm.kernels.triton.kv_ring import plan, taken


@triton.jit
def _tokens(  # type: ignore[no-untyped-def]
    ring, fresh, start, values, basis, mean, first, tile, total, b, g, rank, G, W, fb, fg, ft,
    SIDE: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BT: tl.constexpr, RP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """BT tokens of keys or values; values point at the head's numbers in the page."""
    own = tile * BT + tl.arange(0, BT)
    j = tl.arange(0, RP)
    z = tl.zeros((BT, RP), tl.float32)
    for c0 in range(0, D, BD):
        c = c0 + tl.arange(0, BD)
        there = c < D
        row, column = own[:, None] + c[None, :] * 0, c[None, :] + own[:, None] * 0
        inside = (own < PAGE)[:, None] & there[None, :]
        x = taken(ring, fresh, start, first, row, column, inside, total, b, g, G, W, fb, fg, ft, SIDE, D, PAGE).to(tl.float32)
        x -= tl.load(mean + g * D + c, mask=there, other=0.0)[None, :]
        u = tl.load(basis + (g * D + c[:, None]).to(tl.int64) * D + j[None, :], mask=there[:, None] & (j < rank)[None, :], other=0.0)
        z = tl.dot(x, u, z, input_precision="ieee")
    tl.store(values + own[:, None] * rank + j[None, :], z.to(values.dtype.element_ty), mask=(own < PAGE)[:, None] & (j < rank)[None, :])


@triton.jit
def kv_flush_matryoshka_kernel(  # type: ignore[no-untyped-def]
    k, v, values, uk, mk, uv, mv, sides, ring, lens, start, n, P, page_bytes, record, G, W, limit, kb, kg, kt, vb, vg, vt,
    D: tl.constexpr, PAGE: tl.constexpr, BT: tl.constexpr, RP: tl.constexpr, BD: tl.constexpr, VAT: tl.constexpr,
):  # fmt: skip
    """BT tokens of one page and key head, keys or values. VAT is the byte offset of the values in a page; all heads share its record."""
    total, flushed, until, fits = plan(lens, n, W, limit, PAGE)
    first = flushed + tl.program_id(0) * PAGE
    tile = tl.program_id(2)
    TILES: tl.constexpr = (PAGE + BT - 1) // BT
    SIZE: tl.constexpr = values.dtype.element_ty.primitive_bitwidth // 8
    b, g = tl.program_id(1) // G, tl.program_id(1) % G
    if fits & (first < until):
        to = values + (b.to(tl.int64) * P + first // PAGE) * page_bytes // SIZE
        if tile < TILES:
            before = tl.load(sides + g)
            rank = tl.load(sides + g + 1) - before
            _tokens(ring, k, start, to + PAGE * before, uk, mk, first, tile, total, b, g, rank, G, W, kb, kg, kt, 0, D, PAGE, BT, RP, BD)
        else:
            before = tl.load(sides + G + 1 + g)
            rank = tl.load(sides + G + 2 + g) - before
            to += VAT // SIZE + PAGE * before
            _tokens(ring, v, start, to, uv, mv, first, tile - TILES, total, b, g, rank, G, W, vb, vg, vt, 1, D, PAGE, BT, RP, BD)
