"""Packing pages of KIVI on a GPU, straight from the ring and the new tokens (see kv_ring.py), bytes as the plain-torch encoder makes them.

Maths      per group: s = fp16((max - min) / (2^bits - 1)), 1 where that is zero; z = fp16(min); u = round((x - z) / s), ties to even. NaN makes z NaN.
Layout     runtime/caches/kivi.py: a group is the M axis of a tile, its vectors the N axis; keys M tokens by channels, values M channels by tokens.
           Words of 32 bits hold 32 / bits codes of a row (caches/codes.py).
Grid       (pages that n tokens can fill, B * G, groups of keys + groups of values); programs of pages that stay in the ring leave at once.
Bytes      the page's tokens twice (the second time from the cache), the page once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from effllm.kernels.triton.kv_ring import plan, taken


@triton.jit
def nearest(x):  # type: ignore[no-untyped-def]
    """fp32 |x| < 2^22 rounded to a whole number, ties to even."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def measured(x, inside, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scale and minimum, fp16, of the columns of fp32 x (rows, columns); a NaN makes the minimum NaN."""
    bad = tl.max(((x != x) & inside).to(tl.int32), 0) > 0
    low = tl.min(tl.where(inside & (x == x), x, float("inf")), 0)
    high = tl.max(tl.where(inside & (x == x), x, float("-inf")), 0)
    low = tl.where(bad, float("nan"), low)
    step = tl.div_rn(high - low, tl.full(low.shape, 2**BITS - 1, tl.float32)).to(tl.float16)
    return tl.where(step == 0.0, 1.0, step).to(tl.float16), low.to(tl.float16)


@triton.jit
def coded(x, step, zero, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes of fp32 x; step and zero, fp16, broadcast to its shape."""
    u = tl.div_rn(x - zero.to(tl.float32), tl.broadcast_to(step.to(tl.float32), x.shape))
    u = tl.where((u == u) & (tl.abs(u) < float("inf")), u, 0.0)
    return nearest(tl.minimum(tl.maximum(u, 0.0), 2**BITS - 1)).to(tl.int32)


@triton.jit
def spelled(words, u, row, there, n0, N: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store codes (rows, BN) of columns n0 and on as words of 32 / BITS of them."""
    PER: tl.constexpr = 32 // BITS
    BN: tl.constexpr = u.shape[1]
    place = (n0 + tl.arange(0, BN)) % PER
    u = u << (place % 4 * 8 + place // 4 * BITS)[None, :]
    word = tl.sum(tl.reshape(u, (u.shape[0], BN // PER, PER)), 2)
    j = n0 // PER + tl.arange(0, BN // PER)
    to = ((row // 16) * (N // PER) * 16 + row % 16)[:, None] + j[None, :] * 16
    tl.store(words + to, word, mask=there[:, None] & (j < N // PER)[None, :])


@triton.jit
def _group(  # type: ignore[no-untyped-def]
    ring, fresh, start, words, halves, first, group, total, b, g, G, W, fb, fg, ft,
    SIDE: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, SIZE: tl.constexpr, N: tl.constexpr, MP: tl.constexpr, BN: tl.constexpr, BITS: tl.constexpr,
    CODES: tl.constexpr, SCALE: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """One group of SIZE rows: words and halves point at the record, CODES, SCALE and LOW are byte offsets in it."""
    m = tl.arange(0, MP)
    row = group * SIZE + m
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        inside = (m < SIZE)[:, None] & (n < N)[None, :]
        own = (row[:, None] + n[None, :] * 0) if SIDE == 0 else (n[None, :] + row[:, None] * 0)
        c = (n[None, :] + row[:, None] * 0) if SIDE == 0 else (row[:, None] + n[None, :] * 0)
        x = taken(ring, fresh, start, first, own, c, inside, total, b, g, G, W, fb, fg, ft, SIDE, D, PAGE).to(tl.float32)
        step, zero = measured(x, inside, BITS)
        u = tl.where(inside, coded(x, step[None, :], zero[None, :], BITS), 0)
        spelled(words + CODES // 4, u, row, m < SIZE, n0, N, BITS)
        tl.store(halves + SCALE // 2 + group * N + n, step, mask=n < N)
        tl.store(halves + LOW // 2 + group * N + n, zero, mask=n < N)


@triton.jit
def kv_flush_kivi_kernel(  # type: ignore[no-untyped-def]
    k, v, words, halves, ring, lens, start, n, P, page_bytes, record, G, W, limit, kb, kg, kt, vb, vg, vt,
    D: tl.constexpr, PAGE: tl.constexpr, GROUP: tl.constexpr, VG: tl.constexpr, GP: tl.constexpr, VGP: tl.constexpr, BN: tl.constexpr, BITS: tl.constexpr,
    KS: tl.constexpr, KM: tl.constexpr, VC: tl.constexpr, VS: tl.constexpr, VM: tl.constexpr,
):  # fmt: skip
    """One group of one page and key head."""
    total, flushed, until, fits = plan(lens, n, W, limit, PAGE)
    first = flushed + tl.program_id(0) * PAGE
    group = tl.program_id(2)
    b, g = tl.program_id(1) // G, tl.program_id(1) % G
    if fits & (first < until):
        at = (b.to(tl.int64) * P + first // PAGE) * page_bytes + g.to(tl.int64) * record
        w, h = words + at // 4, halves + at // 2
        if group < PAGE // GROUP:
            _group(ring, k, start, w, h, first, group, total, b, g, G, W, kb, kg, kt, 0, D, PAGE, GROUP, D, GP, BN, BITS, 0, KS, KM)
        else:
            group -= PAGE // GROUP
            _group(ring, v, start, w, h, first, group, total, b, g, G, W, vb, vg, vt, 1, D, PAGE, VG, PAGE, VGP, BN, BITS, VC, VS, VM)
