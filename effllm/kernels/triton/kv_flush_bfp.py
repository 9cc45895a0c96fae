"""Packing block-floating-point pages on a GPU, straight from the ring and the new tokens (see kv_ring.py), bytes as the plain-torch encoder makes them.

Maths      e = floor(log2 max|x|) of a block, at least -110; by rule "raise" one more where rounding the largest would overflow. Codes are
           round(x 2^(bits - 2 - e)), ties to even, within +-(2^(bits-1) - 1). A block with something that is not finite: e = 127 and codes 0.
Layout     runtime/caches/bfp.py: codes (T, D), or for at most 4 bits (T, D / 2) with stored channel i low and i + D / 2 high; exponents (T, D / BLOCK);
           stored channel i is channel order[i] of the model.
Tiles      BT tokens by the two halves of the stored channels. Blocks are gone through one by one, so they may have any size and lie in both halves.
Grid       (pages that n tokens can fill, B * G, tiles of keys + tiles of values); programs of pages that stay in the ring leave at once.
Bytes      the page's tokens once, the page once; some 12 D / BLOCK instructions a pair of elements.
Numerics   the exponent is read from the float's bits, products with powers of two are exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

from effllm.kernels.triton.kv_flush import nearest
from effllm.kernels.triton.kv_ring import plan, taken


@triton.jit
def power(k):  # type: ignore[no-untyped-def]
    """2^k of whole numbers -126 <= k <= 127."""
    return ((k + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def magnitude(x, mask):  # type: ignore[no-untyped-def]
    """The bits of |x|, which are ordered as the numbers are, NaN last; -1 outside."""
    return tl.where(mask, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1)


@triton.jit
def _tokens(  # type: ignore[no-untyped-def]
    ring, fresh, start, octets, order, first, tile, total, b, g, G, W, fb, fg, ft,
    SIDE: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, PAGE: tl.constexpr, BT: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, UP: tl.constexpr,
    CODES: tl.constexpr, EXPS: tl.constexpr,
):  # fmt: skip
    """BT tokens of keys or values; octets point at the record, CODES and EXPS are byte offsets in it."""
    HALF: tl.constexpr = D // 2
    TOP: tl.constexpr = 2 ** (BITS - 1) - 1
    own = tile * BT + tl.arange(0, BT)
    i = tl.arange(0, HP)
    inside = (own < PAGE)[:, None] & (i < HALF)[None, :]
    row = own[:, None] + i[None, :] * 0
    low = tl.load(order + g * D + i, mask=i < HALF, other=0).to(tl.int32)[None, :] + own[:, None] * 0
    high = tl.load(order + g * D + HALF + i, mask=i < HALF, other=0).to(tl.int32)[None, :] + own[:, None] * 0
    x = taken(ring, fresh, start, first, row, low, inside, total, b, g, G, W, fb, fg, ft, SIDE, D, PAGE).to(tl.float32)
    y = taken(ring, fresh, start, first, row, high, inside, total, b, g, G, W, fb, fg, ft, SIDE, D, PAGE).to(tl.float32)
    a, c = magnitude(x, inside), magnitude(y, inside)
    xe = tl.zeros((BT, HP), tl.int32)
    ye = tl.zeros((BT, HP), tl.int32)
    for n in range(D // BLOCK):
        left, right = (i // BLOCK == n)[None, :], ((i + HALF) // BLOCK == n)[None, :]
        most = tl.maximum(tl.max(tl.where(left, a, -1), 1), tl.max(tl.where(right, c, -1), 1))
        bad = most >= 0x7F800000
        e = tl.minimum(tl.maximum((most >> 23) - 127, -110), 125)
        if UP:
            largest = tl.where(bad, 0, most).to(tl.float32, bitcast=True) * power(BITS - 2 - e)
            e += (nearest(largest) > TOP).to(tl.int32)
        e = tl.where(bad, 127, e)
        tl.store(octets + EXPS + own * (D // BLOCK) + n, e.to(tl.uint8), mask=own < PAGE)
        xe = tl.where(left, e[:, None], xe)
        ye = tl.where(right, e[:, None], ye)
    x, y = coded(x, xe, BITS), coded(y, ye, BITS)
    if BITS <= 4:
        tl.store(octets + CODES + own[:, None] * HALF + i[None, :], ((x & 15) | ((y & 15) << 4)).to(tl.uint8), mask=inside)
    else:
        at = octets + CODES + own[:, None] * D + i[None, :]
        tl.store(at, (x & 255).to(tl.uint8), mask=inside)
        tl.store(at + HALF, (y & 255).to(tl.uint8), mask=inside)


@triton.jit
def coded(x, e, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes of x by their exponents; 0 where the block is not finite."""
    TOP: tl.constexpr = 2 ** (BITS - 1) - 1
    bad = e == 127
    scaled = tl.where(bad, 0.0, x) * power(tl.where(bad, 0, BITS - 2 - e))
    return nearest(tl.minimum(tl.maximum(scaled, -TOP), TOP)).to(tl.int32)


@triton.jit
def kv_flush_bfp_kernel(  # type: ignore[no-untyped-def]
    k, v, octets, korder, vorder, ring, lens, start, n, P, page_bytes, record, G, W, limit, kb, kg, kt, vb, vg, vt,
    D: tl.constexpr, HP: tl.constexpr, PAGE: tl.constexpr, BT: tl.constexpr, BLOCK: tl.constexpr, KBITS: tl.constexpr, VBITS: tl.constexpr, UP: tl.constexpr,
    KC: tl.constexpr, KE: tl.constexpr, VC: tl.constexpr, VE: tl.constexpr,
):  # fmt: skip
    """BT tokens of one page and key head, keys or values. KC, KE, VC and VE are byte offsets of a record's fields."""
    total, flushed, until, fits = plan(lens, n, W, limit, PAGE)
    first = flushed + tl.program_id(0) * PAGE
    tile = tl.program_id(2)
    TILES: tl.constexpr = (PAGE + BT - 1) // BT
    b, g = tl.program_id(1) // G, tl.program_id(1) % G
    if fits & (first < until):
        to = octets + (b.to(tl.int64) * P + first // PAGE) * page_bytes + g.to(tl.int64) * record
        if tile < TILES:
            _tokens(ring, k, start, to, korder, first, tile, total, b, g, G, W, kb, kg, kt, 0, D, HP, PAGE, BT, BLOCK, KBITS, UP, KC, KE)
        else:
            _tokens(ring, v, start, to, vorder, first, tile - TILES, total, b, g, G, W, vb, vg, vt, 1, D, HP, PAGE, BT, BLOCK, VBITS, UP, VC, VE)
