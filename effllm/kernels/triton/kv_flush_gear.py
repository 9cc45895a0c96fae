"""Packing GEAR pages on a GPU, straight from the ring and the new tokens (see kv_ring.py), bytes as the plain-torch encoder makes them.

Maths      runtime/caches/gear.py, of X (M, N), vectors along M: keys (page, D), values turned to (D, page). S: each vector's COUNT / 2 smallest and largest
           entries. Y: X - A B^T with S replaced by the vector's mean; H: the dequantized codes of Y (kv_flush.py); E = X - H, 0 at S; A, B: kv_power.py.
           ROUNDS times; then X - A B^T - H at S.
Ranking    a number and its row are one integer of 64 bits, ordered as the numbers are, so a vector's next extreme is one reduction, and an entry is in S
           if it does not lie between the last ones of either end. A NaN is the largest, of two extremes both ends, as torch's argmin and argmax have it.
Layout     the KIVI record, then factors, places and values at S. scratch: `errors` fp32 (M N + N) a program, E and the means, `sides` fp64 (RANK M).
Grid       (pages of a launch, B * G, keys and values); programs of pages that stay in the ring leave at once.
Bytes      the page's tokens 3 + COUNT / 2 times a round (from the caches after the first), E 1 + 2 LOOPS times, the page twice.
Limits     page and head of up to 256, RANK of up to 8: factors are kept in registers.
Numerics   means and all of kv_power.py in fp64, the quantizer in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from effllm.kernels.triton.kv_flush import coded, measured, spelled
from effllm.kernels.triton.kv_kivi import factor
from effllm.kernels.triton.kv_power import keep, power_iteration
from effllm.kernels.triton.kv_ring import plan, taken


@triton.jit
def ordered(x, NAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """int32 ordered as fp32 x is; NAN takes the place of a NaN."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), NAN)


@triton.jit
def ranked(x, row, NAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """int64 ordered as fp32 x is, of equal numbers as their rows are."""
    return ordered(x, NAN).to(tl.int64) * 512 + row


@triton.jit
def below(x, row, bound, NAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """ranked(x, row) <= bound, in 32 bits."""
    size, last = ordered(x, NAN), (bound >> 9).to(tl.int32)[None, :]
    return (size < last) | ((size == last) & (row <= (bound & 511).to(tl.int32)[None, :]))


@triton.jit
def entries(  # type: ignore[no-untyped-def]
    ring, fresh, start, first, row, n, inside, total, b, g, G, W, fb, fg, ft, SIDE: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr
):  # fmt: skip
    """fp32 X at rows and columns n, of one shape."""
    if SIDE == 0:
        return taken(ring, fresh, start, first, row, n, inside, total, b, g, G, W, fb, fg, ft, SIDE, D, PAGE).to(tl.float32)
    else:
        return taken(ring, fresh, start, first, n, row, inside, total, b, g, G, W, fb, fg, ft, SIDE, D, PAGE).to(tl.float32)


@triton.jit
def product(halves, octets, row, n, inside, M: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr, FACTOR: tl.constexpr, A: tl.constexpr, B: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp64 A B^T at rows and columns n, of one shape, from the factors as they are stored."""
    low = tl.zeros(row.shape, tl.float64)
    for r in range(RANK):
        a = factor(halves, octets, A, r * M + row, inside, FACTOR).to(tl.float64)
        low += a * factor(halves, octets, B, r * N + n, inside, FACTOR).to(tl.float64)
    return low


@triton.jit
def _matrix(  # type: ignore[no-untyped-def]
    ring, fresh, start, words, halves, octets, errors, sides, first, total, b, g, G, W, fb, fg, ft,
    SIDE: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SIZE: tl.constexpr, GP: tl.constexpr, BN: tl.constexpr,
    MP: tl.constexpr, NP: tl.constexpr, BM: tl.constexpr, BITS: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr, LOOPS: tl.constexpr,
    ROUNDS: tl.constexpr, COUNT: tl.constexpr, FACTOR: tl.constexpr,
    CODES: tl.constexpr, SCALE: tl.constexpr, LOW: tl.constexpr, A: tl.constexpr, B: tl.constexpr, INDEX: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """Keys or values of one page; words ... octets point at the record, CODES ... VALUE are byte offsets in it."""
    NAN: tl.constexpr = -0x80000000 if COUNT == 2 else 0x7FFFFFFF  # seen from the lower end
    RB: tl.constexpr = GP if GP < 64 else 64  # rows of a tile that need not be a group
    m = tl.arange(0, GP)
    s = tl.arange(0, RB)
    for turn in range(ROUNDS):
        for n0 in range(0, N, BN):
            n = n0 + tl.arange(0, BN)
            inside = (m < SIZE)[:, None] & (n < N)[None, :]
            column = n[None, :] + m[:, None] * 0
            small = tl.full((BN,), -(2**62), tl.int64)
            large = tl.full((BN,), 2**62, tl.int64)
            mean = tl.zeros((BN,), tl.float32)
            if COUNT > 0 and COUNT < M:
                for i in range(COUNT // 2):
                    least = tl.full((BN,), 2**62, tl.int64)
                    most = tl.full((BN,), -(2**62), tl.int64)
                    for m0 in range(0, M, RB):
                        row = m0 + s[:, None] + n[None, :] * 0
                        some = (row < M) & (n < N)[None, :]
                        x = entries(ring, fresh, start, first, row, n[None, :] + s[:, None] * 0, some, total, b, g, G, W, fb, fg, ft, SIDE, D, PAGE)
                        key = ranked(x, row, NAN)
                        least = tl.minimum(least, tl.min(tl.where(some & (key > small[None, :]), key, 2**62), 0))
                        key = ranked(x, row, 0x7FFFFFFF)
                        most = tl.maximum(most, tl.max(tl.where(some & (key < large[None, :]), key, -(2**62)), 0))
                    small, large = least, most
                    tl.store(octets + INDEX + n * COUNT + i, (small & 511).to(tl.uint8), mask=n < N)
                    tl.store(octets + INDEX + n * COUNT + (COUNT - 1 - i), (large & 511).to(tl.uint8), mask=n < N)
            if COUNT == M:
                for i in range(COUNT):
                    tl.store(octets + INDEX + n * COUNT + i, (tl.zeros((BN,), tl.int32) + i).to(tl.uint8), mask=n < N)
            if COUNT > 0:
                whole = tl.zeros((BN,), tl.float64)
                for m0 in range(0, M, RB):
                    row = m0 + s[:, None] + n[None, :] * 0
                    wide = n[None, :] + s[:, None] * 0
                    some = (row < M) & (n < N)[None, :]
                    x = entries(ring, fresh, start, first, row, wide, some, total, b, g, G, W, fb, fg, ft, SIDE, D, PAGE)
                    if ROUNDS > 1 and RANK > 0:
                        low = product(halves, octets, row, wide, some & (turn > 0), M, N, RANK, FACTOR, A, B)
                        x = (x.to(tl.float64) - low).to(tl.float32)
                    whole += tl.sum(tl.where(some, x, 0.0).to(tl.float64), 0)
                mean = (whole / M).to(tl.float32)
                tl.store(errors + M * N + n, mean, mask=n < N)
            for m0 in range(0, M, SIZE):
                row = m0 + m[:, None] + n[None, :] * 0
                x = entries(ring, fresh, start, first, row, column, inside, total, b, g, G, W, fb, fg, ft, SIDE, D, PAGE)
                y = x
                if ROUNDS > 1 and RANK > 0:
                    low = product(halves, octets, row, column, inside & (turn > 0), M, N, RANK, FACTOR, A, B)
                    y = (x.to(tl.float64) - low).to(tl.float32)
                exact = row < M if COUNT == M else row < 0
                if COUNT > 0 and COUNT < M:
                    exact = below(x, row, small, NAN) | ~below(x, row, large - 1, 0x7FFFFFFF)
                y = tl.where(exact, mean[None, :], y)
                step, zero = measured(y, inside, BITS)
                u = tl.where(inside, coded(y, step[None, :], zero[None, :], BITS), 0)
                spelled(words + CODES // 4, u, m0 + m, m < SIZE, n0, N, BITS)
                tl.store(halves + SCALE // 2 + m0 // SIZE * N + n, step, mask=n < N)
                tl.store(halves + LOW // 2 + m0 // SIZE * N + n, zero, mask=n < N)
                rest = x - (zero.to(tl.float32)[None, :] + u.to(tl.float32) * step.to(tl.float32)[None, :])
                tl.store(errors + row * N + column, tl.where(exact, 0.0, rest), mask=inside)
        tl.debug_barrier()
        if RANK > 0:
            left, right = power_iteration(errors, sides, M, N, MP, NP, BM, RANK, RP, LOOPS)
            r, mm, nn = tl.arange(0, RP)[:, None], tl.arange(0, MP)[None, :], tl.arange(0, NP)[None, :]
            keep(halves, octets, A, r * M + mm, left, (r < RANK) & (mm < M), FACTOR)
            keep(halves, octets, B, r * N + nn, right, (r < RANK) & (nn < N), FACTOR)
            tl.debug_barrier()
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        there = n < N
        for i in range(COUNT):
            row = tl.load(octets + INDEX + n * COUNT + i, mask=there, other=0).to(tl.int32)
            x = entries(ring, fresh, start, first, row, n, there, total, b, g, G, W, fb, fg, ft, SIDE, D, PAGE)
            step = tl.load(halves + SCALE // 2 + row // SIZE * N + n, mask=there, other=1.0)
            zero = tl.load(halves + LOW // 2 + row // SIZE * N + n, mask=there, other=0.0)
            u = coded(tl.load(errors + M * N + n, mask=there, other=0.0), step, zero, BITS)
            held = zero.to(tl.float32) + u.to(tl.float32) * step.to(tl.float32)
            low = product(halves, octets, row, n, there, M, N, RANK, FACTOR, A, B)
            value = (x.to(tl.float64) - low - held.to(tl.float64)).to(tl.float32)
            tl.store(halves + VALUE // 2 + n * COUNT + i, value.to(tl.float16), mask=there)


@triton.jit
def kv_flush_gear_kernel(  # type: ignore[no-untyped-def]
    k, v, words, halves, octets, errors, sides, ring, lens, start, n, offset, P, page_bytes, record, G, W, limit, kb, kg, kt, vb, vg, vt,
    D: tl.constexpr, PAGE: tl.constexpr, GROUP: tl.constexpr, VG: tl.constexpr, GP: tl.constexpr, VGP: tl.constexpr, KN: tl.constexpr, VN: tl.constexpr,
    PP: tl.constexpr, DP: tl.constexpr, KROWS: tl.constexpr, VROWS: tl.constexpr, BITS: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr,
    LOOPS: tl.constexpr, ROUNDS: tl.constexpr, NK: tl.constexpr, NV: tl.constexpr, FACTOR: tl.constexpr,
    KS: tl.constexpr, KM: tl.constexpr, VC: tl.constexpr, VS: tl.constexpr, VM: tl.constexpr, KA: tl.constexpr, KB: tl.constexpr, VA: tl.constexpr,
    VB: tl.constexpr, KI: tl.constexpr, KV: tl.constexpr, VI: tl.constexpr, VV: tl.constexpr,
):  # fmt: skip
    """Keys or values of one page and key head; `offset` pages were packed by launches before."""
    total, flushed, until, fits = plan(lens, n, W, limit, PAGE)
    first = flushed + (offset + tl.program_id(0)) * PAGE
    side = tl.program_id(2)
    b, g = tl.program_id(1) // G, tl.program_id(1) % G
    if fits & (first < until):
        at = (b.to(tl.int64) * P + first // PAGE) * page_bytes + g.to(tl.int64) * record
        w, h, o = words + at // 4, halves + at // 2, octets + at
        mine = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * 2 + side
        SIDES: tl.constexpr = RANK * (PAGE if PAGE > D else D)
        e, q = errors + mine * (PAGE * D + (PAGE if PAGE > D else D)), sides + mine * SIDES
        if side == 0:
            _matrix(
                ring, k, start, w, h, o, e, q, first, total, b, g, G, W, kb, kg, kt, 0, D, PAGE, PAGE, D, GROUP, GP, KN, PP, DP, KROWS, BITS, RANK, RP,
                LOOPS, ROUNDS, NK, FACTOR, 0, KS, KM, KA, KB, KI, KV,
            )  # fmt: skip
        else:
            _matrix(
                ring, v, start, w, h, o, e, q, first, total, b, g, G, W, vb, vg, vt, 1, D, PAGE, D, PAGE, VG, VGP, VN, DP, PP, VROWS, BITS, RANK, RP,
                LOOPS, ROUNDS, NV, FACTOR, VC, VS, VM, VB, VA, VI, VV,
            )  # fmt: skip
