"""Attention over Mustafar pages on a GPU (see kv_parts.py): bitmaps and the values that were kept, in the model's dtype, 8 or 4 bits.

Maths      the place of a kept element is the number of set bits before it: those below it in its word, and a running sum over the words.
Layout     runtime/formats/kv/bitmap.py: keys (block of 64 tokens, channel, token), values (token, channel); KEEP of a token, so blocks need no offsets.
Tiles      one block of 64 tokens; keys come as (channels, tokens) and are transposed for the product, values as (tokens, channels).
Bytes      bitmaps and kept values once; elements are gathered from the first-level cache, instructions an element: kv_cost.py.
Limits     D of at most 256: a tile is decoded in registers.
Numerics   elements in the model's dtype are taken as they are; levels are dequantized in fp32 and rounded to the queries' dtype once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from effllm.kernels.triton.kv_parts import leave, masked, near, queries, weigh


@triton.jit
def ones(w):  # type: ignore[no-untyped-def]
    """Set bits of 32-bit words; the compilers know this sum as one instruction."""
    w = w - ((w >> 1) & 0x55555555)
    w = (w & 0x33333333) + ((w >> 2) & 0x33333333)
    w = (w + (w >> 4)) & 0x0F0F0F0F
    return (w * 0x01010101) >> 24


@triton.jit
def places(words, start, SPAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Places of the first SPAN bits of words (A, B), whose first set bit is element `start` (A, B), and which are set: (A, B * SPAN) twice."""
    t = tl.arange(0, SPAN)
    below = ((tl.full((SPAN,), 1, tl.int32) << t) - 1).to(tl.uint32, bitcast=True)[None, None, :]
    w = words.to(tl.uint32, bitcast=True)[:, :, None]
    place = start[:, :, None] + ones(w & below).to(tl.int32)
    on = (w >> t.to(tl.uint32)[None, None, :]) & 1
    SHAPE: tl.constexpr = (words.shape[0], words.shape[1] * SPAN)
    return tl.reshape(place, SHAPE), tl.reshape(on, SHAPE) != 0


@triton.jit
def element(values, octets, place, inside, least, step, at, VAL: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Kept elements `place` of a record that starts at byte `at`, zero outside; least and step (broadcastable) with BITS below 16."""
    if BITS == 16:
        SIZE: tl.constexpr = values.dtype.element_ty.primitive_bitwidth // 8
        return tl.load(values + at // SIZE + VAL // SIZE + place, mask=inside, other=0.0)
    else:
        if BITS == 8:
            code = tl.load(octets + at + VAL + place, mask=inside, other=0).to(tl.int32)
        else:
            code = tl.load(octets + at + VAL + (place >> 1), mask=inside, other=0).to(tl.int32)
            code = tl.where(place & 1 != 0, code >> 4, code)
        # 1 + level / 2^(BITS - 1), the level in the top bits of the mantissa, spares a conversion
        level = ((code << (24 - BITS)) & 0x007FFFFF | 0x3F800000).to(tl.float32, bitcast=True)
        x = (level - 1.0) * (step * 2.0 ** (BITS - 1)) + least
        signed = x.to(tl.int32, bitcast=True) ^ (code << (32 - BITS) & -0x80000000)
        return tl.where(inside, signed.to(tl.float32, bitcast=True), 0.0)


@triton.jit
def kv_bitmap_kernel(  # type: ignore[no-untyped-def]
    q, values, words, halves, octets, ring, lens, mask, part, stats, P, page_bytes, record, G, W, qb, qh, qq, mb, mh, mq, mk, scale,
    R: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, MASK: tl.constexpr, SPLITS: tl.constexpr,
    PAGE: tl.constexpr, KEEP: tl.constexpr, BITS: tl.constexpr,
    KV: tl.constexpr, KMAP: tl.constexpr, KS: tl.constexpr, VV: tl.constexpr, VMAP: tl.constexpr, VS: tl.constexpr,
):  # fmt: skip
    """One key head's packed tokens of one split, or its ring. `words` are halves of bitmaps, KV ... VS byte offsets of a record's fields."""
    lane, split = tl.program_id(0), tl.program_id(1)
    length, flushed = tl.load(lens).to(tl.int32), tl.load(lens + 1).to(tl.int32)
    DTYPE: tl.constexpr = q.dtype.element_ty
    acc = tl.zeros((DP, BM), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    c = tl.arange(0, DP)
    if split == SPLITS:
        acc, top, total = near(q, ring, mask, acc, top, total, lane, flushed, length, G, W, qb, qh, qq, mb, mh, mq, mk, scale, R, Q, D, BM, BT, MASK)
    else:
        turned = queries(q, lane, c, G, qb, qh, qq, R, Q, D, BM)
        n = tl.arange(0, BT)
        two = tl.arange(0, 2)
        NW: tl.constexpr = 2 * ((D + 63) // 64)
        NP: tl.constexpr = (DP + 31) // 32
        SPAN: tl.constexpr = DP // NP
        nw = tl.arange(0, NP)
        base = (lane // G).to(tl.int64) * P * page_bytes + (lane % G).to(tl.int64) * record
        tiles = flushed // BT
        for i in range(tiles * split // SPLITS, tiles * (split + 1) // SPLITS):
            at = base + tl.full((), 1, tl.int64) * (i * BT // PAGE) * page_bytes
            own = i * BT % PAGE
            least, step = 0.0, 0.0
            kw = tl.load(words + at // 4 + KMAP // 4 + ((own // BT * D + c) * 2)[:, None] + two[None, :], mask=(c < D)[:, None], other=0)
            count = ones(kw.to(tl.uint32, bitcast=True)).to(tl.int32)
            count = tl.reshape(count, (2 * DP,))
            place, on = places(kw, tl.reshape(own * KEEP + tl.cumsum(count, 0) - count, (DP, 2)), 32)
            if BITS < 16:
                least = tl.load(halves + at // 2 + KS // 2 + (own + n) * 2).to(tl.float32)[None, :]
                step = tl.load(halves + at // 2 + KS // 2 + (own + n) * 2 + 1).to(tl.float32)[None, :]
            k = element(values, octets, place, on, least, step, at, KV, BITS).to(DTYPE)
            s = masked(tl.dot(tl.trans(k), turned, input_precision="ieee"), mask, lane, i * BT + n, n < BT, G, mb, mh, mq, mk, scale, R, Q, MASK)
            p, shrink, top, total = weigh(s, top, total)
            vw = tl.load(words + at // 4 + VMAP // 4 + ((own + n) * NW)[:, None] + nw[None, :], mask=(nw < NW)[None, :], other=0)
            count = ones(vw.to(tl.uint32, bitcast=True)).to(tl.int32)
            place, on = places(vw, ((own + n) * KEEP)[:, None] + tl.cumsum(count, 1) - count, SPAN)
            if BITS < 16:
                least = tl.load(halves + at // 2 + VS // 2 + (own + n) * 2).to(tl.float32)[:, None]
                step = tl.load(halves + at // 2 + VS // 2 + (own + n) * 2 + 1).to(tl.float32)[:, None]
            v = element(values, octets, place, on, least, step, at, VV, BITS).to(DTYPE)
            acc = tl.dot(tl.trans(v), p.to(DTYPE), acc * shrink[None, :], input_precision="ieee")
    leave(part, stats, acc, top, total, lane, split, c, D, SPLITS)
