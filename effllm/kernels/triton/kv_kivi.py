"""Attention over KIVI and GEAR pages on a GPU (see kv_parts.py): codes of 2, 4 and 8 bits, a low-rank correction, exact outliers.

Maths      k[t, c] = s u + z with s, z of a token group and channel, so q . k = (q s) . (u - m) + q . (z + m s), m = 2^(bits - 1): without outliers
           the codes themselves are an operand. Values with one group a token alike, by scaling the weights; with several they are dequantized.
Layout     runtime/caches/kivi.py and gear.py. Words of 32 bits hold 32 / bits columns of a row (caches/codes.py); byte pairs 16 bits apart are
           unpacked together, so the columns of an unpacked tile lie in the order of `order`: queries, scales and weights follow it.
Tiles      BT tokens, within one group of keys: 64 for groups of 64 and more and heads of up to 128 channels.
Bytes      a page once; instructions an element: kv_cost.py.
Limits     BT a power of two from 16 that divides the group; outliers are looked for in every element, NK + NV compares each.
Numerics   u - m is exact in 16 bits; q s, a dequantized key or a scaled weight is rounded to the queries' dtype once, a dequantized value to fp16, whose
           range its scale and minimum have (fp32 queries: fp32). Low-rank part in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from effllm.kernels.triton.kv_parts import leave, masked, near, queries, weigh


@triton.jit
def order(k, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The column that place k of an unpacked row holds."""
    F: tl.constexpr = 8 // BITS
    return k // (4 * F) * (4 * F) + k // 2 % F * 4 + k % 2 * 2 + k // (2 * F) % 2


@triton.jit
def ordered(p, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows (BT, BM) in natural order brought into that of `order`."""
    F: tl.constexpr = 8 // BITS
    BT: tl.constexpr = p.shape[0]
    split = tl.reshape(p, (BT // (4 * F), F, 2, 2, p.shape[1]))
    return tl.reshape(tl.permute(split, (0, 3, 1, 2, 4)), (BT, p.shape[1]))


@triton.jit
def unpack(words, BITS: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """u - 2^(BITS - 1) of words (R, J): (R, J * 32 / BITS) in the order of `order`, exact in DTYPE. See fields.py for the magic numbers."""
    x = tl.join(words, words >> 8)
    if BITS <= 4:
        x = tl.join(x, x >> 4)
    if BITS == 2:
        x = tl.join(x, x >> 2)
    two = x & ((2**BITS - 1) * 0x00010001)
    if DTYPE.is_bf16() and BITS <= 4:  # bf16 128 + u
        two = two | 0x43004300
        low = (two & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
        high = (two >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        both = tl.join(low, high) - (128.0 + 2 ** (BITS - 1))
    else:
        two = two | 0x64006400
        low = (two & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
        high = (two >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        both = tl.join(low, high) - (1024.0 + 2 ** (BITS - 1))
    return tl.reshape(both, (words.shape[0], words.shape[1] * (32 // BITS))).to(DTYPE)


@triton.jit
def spread(x, WIDE: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """(NG, BT) to (NG * WIDE, BT), every row WIDE times."""
    return tl.reshape(tl.broadcast_to(tl.expand_dims(x.to(DTYPE), 1), (x.shape[0], WIDE, x.shape[1])), (x.shape[0] * WIDE, x.shape[1]))


@triton.jit
def dequantized(words, scales, lows, c, t, D: tl.constexpr, VG: tl.constexpr, PAGE: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Values (channels c, tokens t) in DTYPE of their words; scales and lows point at numbers (D / VG, PAGE)."""
    MIDDLE: tl.constexpr = 2.0 ** (BITS - 1)
    DP: tl.constexpr = c.shape[0]
    if VG & (VG - 1) == 0 and VG < DP:
        g = tl.arange(0, DP // VG)
        inside = (g < D // VG)[:, None] & (t >= 0)[None, :]
        s = tl.load(scales + g[:, None] * PAGE + t[None, :], mask=inside, other=0.0).to(tl.float32)
        low = tl.load(lows + g[:, None] * PAGE + t[None, :], mask=inside, other=0.0).to(tl.float32) + MIDDLE * s
        return tl.fma(unpack(words, BITS, DTYPE), spread(s, VG, DTYPE), spread(low, VG, DTYPE))
    else:
        at = (c // VG)[:, None] * PAGE + t[None, :]
        inside = (c < D)[:, None] & (t >= 0)[None, :]
        s = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32)
        low = tl.load(lows + at, mask=inside, other=0.0).to(tl.float32) + MIDDLE * s
        return tl.fma(unpack(words, BITS, tl.float32), s, low).to(DTYPE)


@triton.jit
def factor(halves, octets, at, i, inside, FACTOR: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 elements i of a factor that starts at byte `at`: fp16, or its upper bytes."""
    if FACTOR == 16:
        return tl.load(halves + at // 2 + i, mask=inside, other=0.0).to(tl.float32)
    else:
        return (tl.load(octets + at + i, mask=inside, other=0).to(tl.int16) << 8).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def exactly(x, index, value, at, inside, e):  # type: ignore[no-untyped-def]
    """Entry e of every column of x (rows `at`, columns) added at its row."""
    place = tl.load(index + e, mask=inside, other=0).to(tl.int32)
    return x + tl.where(at[:, None] == place[None, :], tl.load(value + e, mask=inside, other=0.0).to(tl.float32)[None, :], 0.0)


@triton.jit
def corrected(x, index, value, at, inside, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """All COUNT entries of every column; index and value point at each column's first."""
    if COUNT <= 4:
        for e in tl.static_range(COUNT):
            x = exactly(x, index, value, at, inside, e)
    else:  # unrolled, so many would not fit the registers
        for e in range(COUNT):
            x = exactly(x, index, value, at, inside, e)
    return x


@triton.jit
def kv_kivi_kernel(  # type: ignore[no-untyped-def]
    q, words, halves, octets, ring, lens, mask, part, stats, P, page_bytes, record, G, W, qb, qh, qq, mb, mh, mq, mk, scale,
    R: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, MASK: tl.constexpr, SPLITS: tl.constexpr,
    PAGE: tl.constexpr, GROUP: tl.constexpr, VG: tl.constexpr, BITS: tl.constexpr, RANK: tl.constexpr, FACTOR: tl.constexpr,
    NK: tl.constexpr, NV: tl.constexpr,
    KS: tl.constexpr, KM: tl.constexpr, VC: tl.constexpr, VS: tl.constexpr, VM: tl.constexpr, KA: tl.constexpr, KB: tl.constexpr, VA: tl.constexpr,
    VB: tl.constexpr, KI: tl.constexpr, KV: tl.constexpr, VI: tl.constexpr, VV: tl.constexpr,
):  # fmt: skip
    """One key head's packed tokens of one split, or its ring. KS ... VV are byte offsets of a record's fields."""
    lane, split = tl.program_id(0), tl.program_id(1)
    length, flushed = tl.load(lens).to(tl.int32), tl.load(lens + 1).to(tl.int32)
    DTYPE: tl.constexpr = q.dtype.element_ty
    VTYPE: tl.constexpr = tl.float32 if DTYPE.is_fp32() else tl.float16  # scales are fp16, so dequantized values fit
    PER: tl.constexpr = 32 // BITS  # columns of a word
    MIDDLE: tl.constexpr = 2.0 ** (BITS - 1)
    acc = tl.zeros((DP, BM), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    c = tl.arange(0, DP)
    if split == SPLITS:
        acc, top, total = near(q, ring, mask, acc, top, total, lane, flushed, length, G, W, qb, qh, qq, mb, mh, mq, mk, scale, R, Q, D, BM, BT, MASK)
    else:
        kc = order(c, BITS)
        turned = queries(q, lane, kc, G, qb, qh, qq, R, Q, D, BM)
        wide = turned.to(tl.float32)
        j = tl.arange(0, DP // PER)
        jt = tl.arange(0, BT // PER)
        n = tl.arange(0, BT)
        nc = order(n, BITS)
        base = (lane // G).to(tl.int64) * P * page_bytes + (lane % G).to(tl.int64) * record
        tiles = flushed // BT
        for i in range(tiles * split // SPLITS, tiles * (split + 1) // SPLITS):
            at = base + tl.full((), 1, tl.int64) * (i * BT // PAGE) * page_bytes
            own = i * BT % PAGE
            w32 = words + at // 4
            w16 = halves + at // 2
            row = own + n
            kw = tl.load(w32 + ((row // 16) * (D // PER) * 16 + row % 16)[:, None] + j[None, :] * 16, mask=(j < D // PER)[None, :], other=0)
            group = w16 + own // GROUP * D + kc
            ks = tl.load(group + KS // 2, mask=kc < D, other=0.0).to(tl.float32)
            low = tl.load(group + KM // 2, mask=kc < D, other=0.0).to(tl.float32) + MIDDLE * ks
            if NK > 0:
                k = tl.fma(unpack(kw, BITS, tl.float32), tl.broadcast_to(ks[None, :], (BT, DP)), tl.broadcast_to(low[None, :], (BT, DP)))
                k = corrected(k, octets + at + KI + kc * NK, w16 + KV // 2 + kc * NK, row, kc < D, NK)
                s = tl.dot(k.to(DTYPE), turned, input_precision="ieee")
            else:
                s = tl.dot(unpack(kw, BITS, DTYPE), (wide * ks[:, None]).to(DTYPE), input_precision="ieee") + tl.sum(wide * low[:, None], 0)[None, :]
            for e in tl.static_range(RANK):
                kb = factor(halves, octets, at + KB, e * D + kc, kc < D, FACTOR)
                ka = factor(halves, octets, at + KA, e * PAGE + row, n < BT, FACTOR)
                s += ka[:, None] * tl.sum(wide * kb[:, None], 0)[None, :]
            s = masked(s, mask, lane, i * BT + n, n < BT, G, mb, mh, mq, mk, scale, R, Q, MASK)
            p, shrink, top, total = weigh(s, top, total)
            acc = acc * shrink[None, :]
            vw = tl.load(
                w32 + VC // 4 + ((c // 16) * (PAGE // PER) * 16 + c % 16)[:, None] + (own // PER + jt)[None, :] * 16, mask=(c < D)[:, None], other=0
            )
            if VG == D and NV == 0:
                vs = tl.load(w16 + VS // 2 + row).to(tl.float32)
                rest = tl.load(w16 + VM // 2 + row).to(tl.float32) + MIDDLE * vs
                acc = tl.dot(unpack(vw, BITS, DTYPE), ordered(p * vs[:, None], BITS).to(DTYPE), acc, input_precision="ieee")
                acc += tl.sum(p * rest[:, None], 0)[None, :]
            else:
                token = own + nc
                v = dequantized(vw, w16 + VS // 2, w16 + VM // 2, c, token, D, VG, PAGE, BITS, tl.float32 if NV > 0 else VTYPE)
                if NV > 0:
                    v = corrected(v, octets + at + VI + token * NV, w16 + VV // 2 + token * NV, c, token >= 0, NV)
                acc = tl.dot(v.to(VTYPE), ordered(p, BITS).to(VTYPE), acc, input_precision="ieee")
            for e in tl.static_range(RANK):
                vb = factor(halves, octets, at + VB, e * D + c, c < D, FACTOR)
                va = factor(halves, octets, at + VA, e * PAGE + row, n < BT, FACTOR)
                acc += vb[:, None] * tl.sum(p * va[:, None], 0)[None, :]
    leave(part, stats, acc, top, total, lane, split, c, D, SPLITS)
