"""Packing Mustafar pages on a GPU, straight from the ring and the new tokens (see kv_ring.py), bytes as the plain-torch encoder makes them.

Maths      the threshold of a token is the largest magnitude that at least KEEP channels reach: found bit by bit from the top, 31 - LOW counts over the
           channels (floats of one sign order as their bits do; 16-bit types have LOW zero bits below). Of equal magnitudes the first ones stay.
           NaN counts as infinitely large. With BITS of 8 or 4: sign and level between the least and the largest kept magnitude of the token.
Layout     runtime/formats/kv/bitmap.py: keys (block of 64 tokens, channel, token), values (token, channel); places are running sums of the bitmap.
Grid       (pages that n tokens can fill, B * G, blocks of 64 tokens of keys + as many of values); others leave at once.
Limits     4-bit codes meet in bytes: they go through `scratch`, 64 KEEP bytes a program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from effllm.kernels.triton.kv_flush import nearest
from effllm.kernels.triton.kv_ring import plan, taken


@triton.jit
def kept(size, KEEP: tl.constexpr, LOW: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which of the magnitudes (tokens, channels), as integers, -1 for no channel, are kept: exactly KEEP of a token."""
    least = tl.zeros((size.shape[0],), tl.int32)
    for i in range(31 - LOW):
        trial = least + (1 << (30 - i))
        least = tl.where(tl.sum((size >= trial[:, None]).to(tl.int32), 1) >= KEEP, trial, least)
    more = size > least[:, None]
    equal = (size == least[:, None]).to(tl.int32)
    room = KEEP - tl.sum(more.to(tl.int32), 1)
    return more | ((equal > 0) & (tl.cumsum(equal, 1) <= room[:, None]))


@triton.jit
def levels(x, mask, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes (tokens, channels), least and step (tokens) fp16, of the kept numbers."""
    TOP: tl.constexpr = 2 ** (BITS - 1) - 1
    size = tl.abs(x)
    bad = tl.max(((x != x) & mask).to(tl.int32), 1) > 0
    sound = mask & (x == x)
    least = tl.where(bad, float("nan"), tl.min(tl.where(sound, size, float("inf")), 1)).to(tl.float16)
    most = tl.where(bad, float("nan"), tl.max(tl.where(sound, size, 0.0), 1))
    step = tl.div_rn(most - least.to(tl.float32), tl.full(most.shape, TOP, tl.float32))
    step = tl.where(step < 0.0, 0.0, step).to(tl.float16)
    step = tl.where(step == 0.0, 1.0, step).to(tl.float16)
    level = tl.div_rn(size - least.to(tl.float32)[:, None], tl.broadcast_to(step.to(tl.float32)[:, None], x.shape))
    level = nearest(tl.minimum(tl.maximum(tl.where(level == level, level, 0.0), 0.0), TOP)).to(tl.int32)
    return level | ((x < 0).to(tl.int32) << (BITS - 1)), least, step


@triton.jit
def _block(  # type: ignore[no-untyped-def]
    ring, fresh, start, values, words, halves, octets, scratch, first, block, total, b, g, G, W, fb, fg, ft,
    SIDE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, KEEP: tl.constexpr, BITS: tl.constexpr, LOW: tl.constexpr,
    VAL: tl.constexpr, MAP: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """64 tokens of keys or values; values ... octets point at the record, VAL, MAP and SCALE are byte offsets in it."""
    t = tl.arange(0, 64)
    c = tl.arange(0, DP)
    own = block * 64 + t
    there = (c < D)[None, :] & (t < 64)[:, None]
    held = taken(ring, fresh, start, first, own[:, None] + c[None, :] * 0, c[None, :] + t[:, None] * 0, there, total, b, g, G, W, fb, fg, ft, SIDE, D, PAGE)
    x = held.to(tl.float32)
    bits = tl.where(x == x, tl.abs(x), float("inf")).to(tl.int32, bitcast=True)
    mask = kept(tl.where(there, bits, -1), KEEP, LOW)
    one = mask.to(tl.int32)
    wide = mask.to(tl.int64)
    if SIDE == 0:
        count = tl.sum(one, 0)
        place = (tl.cumsum(count, 0) - count)[None, :] + tl.cumsum(one, 0) - one
        tl.store(words + MAP // 8 + block * D + c, tl.sum(wide << t[:, None], 0), mask=c < D)
    else:
        NW: tl.constexpr = (D + 63) // 64
        NP: tl.constexpr = (DP + 63) // 64
        place = t[:, None] * KEEP + tl.cumsum(one, 1) - one
        word = tl.sum(tl.reshape(wide << (c % 64)[None, :], (64, NP, DP // NP)), 2)
        i = tl.arange(0, NP)
        tl.store(words + MAP // 8 + own[:, None] * NW + i[None, :], word, mask=(i < NW)[None, :] & (t < 64)[:, None])
    if BITS == 16:
        tl.store(values + VAL // (values.dtype.element_ty.primitive_bitwidth // 8) + block * 64 * KEEP + place, held, mask=mask)
    else:
        code, least, step = levels(x, mask, BITS)
        tl.store(halves + SCALE // 2 + own * 2, least)
        tl.store(halves + SCALE // 2 + own * 2 + 1, step)
        if BITS == 8:
            tl.store(octets + VAL + block * 64 * KEEP + place, code.to(tl.uint8), mask=mask)
        else:
            tl.store(scratch + place, code.to(tl.uint8), mask=mask)
            tl.debug_barrier()
            for i0 in range(0, 32 * KEEP, 512):
                i2 = i0 + tl.arange(0, 512)
                near = tl.load(scratch + 2 * i2, mask=i2 < 32 * KEEP, other=0)
                far = tl.load(scratch + 2 * i2 + 1, mask=i2 < 32 * KEEP, other=0)
                tl.store(octets + VAL + block * 32 * KEEP + i2, near | (far << 4), mask=i2 < 32 * KEEP)


@triton.jit
def kv_flush_bitmap_kernel(  # type: ignore[no-untyped-def]
    k, v, values, words, halves, octets, scratch, ring, lens, start, n, P, page_bytes, record, G, W, limit, kb, kg, kt, vb, vg, vt,
    D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, KEEP: tl.constexpr, BITS: tl.constexpr, LOW: tl.constexpr,
    KV: tl.constexpr, KMAP: tl.constexpr, KS: tl.constexpr, VV: tl.constexpr, VMAP: tl.constexpr, VS: tl.constexpr,
):  # fmt: skip
    """One block of one page and key head."""
    total, flushed, until, fits = plan(lens, n, W, limit, PAGE)
    first = flushed + tl.program_id(0) * PAGE
    block = tl.program_id(2)
    b, g = tl.program_id(1) // G, tl.program_id(1) % G
    if fits & (first < until):
        at = (b.to(tl.int64) * P + first // PAGE) * page_bytes + g.to(tl.int64) * record
        x = values + at // (values.dtype.element_ty.primitive_bitwidth // 8)
        w, h, o = words + at // 8, halves + at // 2, octets + at
        mine = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * tl.num_programs(2) + block
        z = scratch + mine * 64 * KEEP
        if block < PAGE // 64:
            _block(ring, k, start, x, w, h, o, z, first, block, total, b, g, G, W, kb, kg, kt, 0, D, DP, PAGE, KEEP, BITS, LOW, KV, KMAP, KS)
        else:
            _block(ring, v, start, x, w, h, o, z, first, block - PAGE // 64, total, b, g, G, W, vb, vg, vt, 1, D, DP, PAGE, KEEP, BITS, LOW, VV, VMAP, VS)
