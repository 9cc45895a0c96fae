"""Attention over block-floating-point pages on a GPU (see kv_parts.py): codes of 2 to 8 bits, an exponent for each block of channels of a token.

Maths      x = code * 2^(e - bits + 2); the power is built in the exponent field of a float. e = 127 marks a block that is not finite: NaN.
Layout     runtime/caches/bfp.py: bytes of two codes hold channel i low and i + D / 2 high; stored channel i is channel table[i] of the model, for which
           queries are gathered and the values' share is stored to its place.
Tiles      64 tokens, or a page where that is smaller; nibbles are joined, so unpacked columns are (i, half).
Bytes      codes and exponents once; instructions an element: kv_cost.py.
Limits     blocks are a power of two; packed codes: a block lies within one half of the channels, or is all of them.
Numerics   codes times powers of two are exact in fp32 and, up to 8 bits, in 16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from effllm.kernels.triton.kv_parts import leave, masked, near, queries, weigh


@triton.jit
def powers(octets, at, token, half, D: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """2^(e - bits + 2) of the WIDE (padded) channels of a row or, `half` 0 or 1, of one half of it: (tokens, WIDE)."""
    NB: tl.constexpr = D // BLOCK
    PART: tl.constexpr = NB if BITS > 4 or NB == 1 else NB // 2
    EACH: tl.constexpr = WIDE if NB == 1 else BLOCK
    j = tl.arange(0, WIDE // EACH)
    e = tl.load(octets + at + token[:, None] * NB + half * (NB - PART) + j[None, :], mask=(j < PART)[None, :], other=0).to(tl.int8, bitcast=True).to(tl.int32)
    power = tl.where(e == 127, float("nan"), ((e + (129 - BITS)) << 23).to(tl.float32, bitcast=True))
    return tl.reshape(tl.broadcast_to(tl.expand_dims(power, 2), (token.shape[0], WIDE // EACH, EACH)), (token.shape[0], WIDE))


@triton.jit
def stored(k, D: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The stored channel at place k of an unpacked row; D and more where there is none."""
    if BITS <= 4:
        return tl.where(k // 2 < D // 2, k // 2 + k % 2 * (D // 2), D)
    else:
        return k


@triton.jit
def unpack(octets, codes, exponents, token, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 (tokens, DP) in the order of `stored`; codes and exponents are byte offsets."""
    if BITS <= 4:
        i = tl.arange(0, DP // 2)
        inside = (i < D // 2)[None, :]
        both = tl.load(octets + codes + token[:, None] * (D // 2) + i[None, :], mask=inside, other=0).to(tl.int32)
        low = ((both << 28) >> 28).to(tl.float32) * powers(octets, exponents, token, 0, D, BLOCK, BITS, DP // 2)
        high = ((both << 24) >> 28).to(tl.float32) * powers(octets, exponents, token, 1, D, BLOCK, BITS, DP // 2)
        # padded columns may lie in a block that is NaN
        return tl.reshape(tl.join(tl.where(inside, low, 0.0), tl.where(inside, high, 0.0)), (token.shape[0], DP))
    else:
        i = tl.arange(0, DP)
        inside = (i < D)[None, :]
        code = tl.load(octets + codes + token[:, None] * D + i[None, :], mask=inside, other=0).to(tl.int8, bitcast=True).to(tl.float32)
        return tl.where(inside, code * powers(octets, exponents, token, 0, D, BLOCK, BITS, DP), 0.0)


@triton.jit
def kv_bfp_kernel(  # type: ignore[no-untyped-def]
    q, octets, korder, vorder, ring, lens, mask, part, stats, P, page_bytes, record, G, W, qb, qh, qq, mb, mh, mq, mk, scale,
    R: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, MASK: tl.constexpr, SPLITS: tl.constexpr,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, KBITS: tl.constexpr, VBITS: tl.constexpr, KE: tl.constexpr, VC: tl.constexpr, VE: tl.constexpr,
):  # fmt: skip
    """One key head's packed tokens of one split, or its ring. KE, VC and VE are byte offsets of a record's fields."""
    lane, split = tl.program_id(0), tl.program_id(1)
    length, flushed = tl.load(lens).to(tl.int32), tl.load(lens + 1).to(tl.int32)
    DTYPE: tl.constexpr = q.dtype.element_ty
    acc = tl.zeros((DP, BM), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    place = tl.arange(0, DP)
    if split == SPLITS:
        acc, top, total = near(q, ring, mask, acc, top, total, lane, flushed, length, G, W, qb, qh, qq, mb, mh, mq, mk, scale, R, Q, D, BM, BT, MASK)
        leave(part, stats, acc, top, total, lane, split, place, D, SPLITS)
    else:
        kc, vc = stored(place, D, KBITS), stored(place, D, VBITS)
        kc = tl.load(korder + lane % G * D + kc, mask=kc < D, other=D).to(tl.int32)
        vc = tl.load(vorder + lane % G * D + vc, mask=vc < D, other=D).to(tl.int32)
        turned = queries(q, lane, kc, G, qb, qh, qq, R, Q, D, BM)
        n = tl.arange(0, BT)
        base = (lane // G).to(tl.int64) * P * page_bytes + (lane % G).to(tl.int64) * record
        tiles = flushed // BT
        for i in range(tiles * split // SPLITS, tiles * (split + 1) // SPLITS):
            at = base + tl.full((), 1, tl.int64) * (i * BT // PAGE) * page_bytes
            own = i * BT % PAGE + n
            k = unpack(octets, at, at + KE, own, D, DP, BLOCK, KBITS).to(DTYPE)
            s = masked(tl.dot(k, turned, input_precision="ieee"), mask, lane, i * BT + n, n < BT, G, mb, mh, mq, mk, scale, R, Q, MASK)
            p, shrink, top, total = weigh(s, top, total)
            v = unpack(octets, at + VC, at + VE, own, D, DP, BLOCK, VBITS).to(DTYPE)
            acc = tl.dot(tl.trans(v), p.to(DTYPE), acc * shrink[None, :], input_precision="ieee")
        leave(part, stats, acc, top, total, lane, split, vc, D, SPLITS)
