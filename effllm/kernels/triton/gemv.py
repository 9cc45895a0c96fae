"""Packed GEMV: a few rows of activations times a bipolar weight of 1 to 8 bits, on the ordinary cores.

Maths      y[m, n] = sum_g 2 s[g, n] (sum_{k in g} u[k, n] x[m, k] - zero sum_{k in g} x[m, k])        symmetric and integer grids
                   = sum_g 2 s[g, n] sum_{k in g} u[k, n] x[m, k] + minimum[g, n] sum_{k in g} x[m, k]  affine grid
           u is the sum of its parts (fields.py), so each part of P bits is a GEMV of its own with weight 2^BELOW. A word row lies
           within one group (or two, P = 1 and groups of 16), hence one scale multiply per word and one sum of x per row, not per weight.
           A field reads 1 + c / 2^d; with x' = 2^d x the chain sums x c + x', and the row's sum of x' is subtracted once.
Layout     x (M, K) rows STRIDE apart, fp16, bf16, fp32 or int8; codes, scale, minimum as runtime/layouts/words.py; y, workspace as epilogue.py.
           Tile: BK columns = R = BK * P / 32 word rows by BN outputs; MB accumulators (R, BN) are summed over R after the loop.
Bytes      N K BITS / 8 + N G itemsize (1 + affine) + M K itemsize;  2 M N K flops, on about (1 + P / DEPTH) + M instructions per weight.
Grid       (ceil(N / BN), SPLIT, ceil(M / MB)); split s takes `tiles` tiles of K; splits are added by splitk.py, no atomics.
Limits     any M, N, K; BK >= 32; MB in 1, 2, 4. EVEN: K and KB * 32 are multiples of BK and NP of BN. Meant for M <= 4, gemm.py beyond.
Numerics   fp32 chains. 16-bit x: DEPTH 8 (two 4-bit fields share a shift) costs at most 8 of 24 bits within a word; fp32 x: DEPTH = P.
           int8 x: every sum within a word is an exact integer below 2^24, so the result equals integer arithmetic.
Reference  lowering/bipolar_linear.py: linear_reference, linear_a8_reference.
"""

from __future__ import annotations

import triton
import triton.language as tl

from effllm.kernels.triton.epilogue import store
from effllm.kernels.triton.fields import scalar, window


@triton.jit
def multiply(xrow, words, start, K, one, P: tl.constexpr, DEPTH: tl.constexpr, SUB: tl.constexpr, PIECE: tl.constexpr, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row of x times the columns of word piece PIECE of SUB: (R, BN) sums that still hold `lifted`, and (R,) sums lifted and plain."""
    chain = tl.zeros(words.shape, tl.float32)
    lifted = tl.zeros(start.shape, tl.float32)
    plain = tl.zeros(start.shape, tl.float32)
    for bit in tl.static_range(0, 32, DEPTH):
        if (bit % 16) * SUB // 16 == PIECE:
            shifted = window(words, bit, DEPTH)
            for field in tl.static_range(DEPTH // P):
                k = start + ((bit + field * P) % 16 // P * 2 + bit // 16)
                xv = (tl.load(xrow + k) if EVEN else tl.load(xrow + k, mask=k < K, other=0)).to(tl.float32)
                xd = xv * (2.0 ** (DEPTH - field * P))
                chain += scalar(shifted, one, P, DEPTH - field * P) * xd[:, None]
                lifted += xd
                plain += xv
    return chain, lifted, plain


@triton.jit
def row_sum(  # type: ignore[no-untyped-def]
    acc, xrow, words, s, low, start, K, zero, one,
    P: tl.constexpr, FIRST: tl.constexpr, DEPTH: tl.constexpr, SUB: tl.constexpr, PIECE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """acc (R, BN) plus one row's share of these words: scale times the codes' sum, and the zero point or minimum with the first part."""
    chain, lifted, plain = multiply(xrow, words, start, K, one, P, DEPTH, SUB, PIECE, EVEN)
    if FIRST and low is None:
        lifted += plain * zero
    acc += (chain - lifted[:, None]) * s
    if FIRST and low is not None:
        acc += plain[:, None] * low
    return acc


@triton.jit
def part_sum(  # type: ignore[no-untyped-def]
    x, codes, scale, minimum, m, n, first, last, M, K, NP, KB, stride, zero, one,
    BITS: tl.constexpr, P: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr, MB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums over tiles first .. last of one part for up to four rows, four (BN,) fp32 tensors; rows past MB stay zero.

    Rows are named and not an axis: a third axis makes the compiler lose the layout of the words, at four times the instructions.
    """
    F: tl.constexpr = 32 // P
    R: tl.constexpr = BK // F
    SUB: tl.constexpr = F // GROUP if GROUP > 0 and GROUP < F else 1
    DEPTH: tl.constexpr = P if WIDE else 8
    ABOVE: tl.constexpr = BITS & (16 - 2 * P)
    WEIGHT: tl.constexpr = 2.0 ** (BITS & (P - 1))
    r = tl.arange(0, R)
    acc0 = tl.zeros((R, BN), tl.float32)
    acc1 = tl.zeros((R, BN), tl.float32)
    acc2 = tl.zeros((R, BN), tl.float32)
    acc3 = tl.zeros((R, BN), tl.float32)
    x0 = x + m * stride
    x1 = x + tl.minimum(m + 1, M - 1) * stride
    x2 = x + tl.minimum(m + 2, M - 1) * stride
    x3 = x + tl.minimum(m + 3, M - 1) * stride
    for index in tl.range(first, last, num_stages=STAGES):
        row = index * R + r
        inside = (row < P * KB)[:, None] & (n < NP)[None, :]
        at = (ABOVE * KB + row)[:, None] * NP + n[None, :]
        words = load(codes + at, inside, EVEN)
        for piece in tl.static_range(SUB):
            g = (row * F) // GROUP + piece if GROUP > 0 else row * 0
            where = g[:, None] * NP + n[None, :]
            s = load(scale + where, inside, EVEN).to(tl.float32)
            low = None
            if minimum is not None:
                low = load(minimum + where, inside, EVEN).to(tl.float32) * (0.5 / WEIGHT)
            acc0 = row_sum(acc0, x0, words, s, low, row * F, K, zero / WEIGHT, one, P, ABOVE == 0, DEPTH, SUB, piece, EVEN)
            if MB > 1:
                acc1 = row_sum(acc1, x1, words, s, low, row * F, K, zero / WEIGHT, one, P, ABOVE == 0, DEPTH, SUB, piece, EVEN)
            if MB > 2:
                acc2 = row_sum(acc2, x2, words, s, low, row * F, K, zero / WEIGHT, one, P, ABOVE == 0, DEPTH, SUB, piece, EVEN)
                acc3 = row_sum(acc3, x3, words, s, low, row * F, K, zero / WEIGHT, one, P, ABOVE == 0, DEPTH, SUB, piece, EVEN)
    double: tl.constexpr = 2.0 * WEIGHT
    return tl.sum(acc0, 0) * double, tl.sum(acc1, 0) * double, tl.sum(acc2, 0) * double, tl.sum(acc3, 0) * double


@triton.jit
def load(pointer, inside, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """A weight tile, read once: no mask where the tiles divide the weight."""
    if EVEN:
        return tl.load(pointer, eviction_policy="evict_first")
    else:
        return tl.load(pointer, mask=inside, other=0, eviction_policy="evict_first")


@triton.jit
def gemv_kernel(  # type: ignore[no-untyped-def]
    x, codes, scale, minimum, bias, xs, y, M, N, K, NP, KB, stride, tiles, zero, one,
    BITS: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr, MB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EVEN: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Up to four rows and BN outputs over one split of K."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    m = tl.program_id(2) * MB
    first = split * tiles
    last = tl.minimum(first + tiles, tl.cdiv(KB * 32, BK))
    y0 = tl.zeros((BN,), tl.float32)
    y1 = tl.zeros((BN,), tl.float32)
    y2 = tl.zeros((BN,), tl.float32)
    y3 = tl.zeros((BN,), tl.float32)
    for i in tl.static_range(4):
        if BITS & (8 >> i):
            a0, a1, a2, a3 = part_sum(
                x, codes, scale, minimum, m, n, first, last, M, K, NP, KB, stride, zero, one, BITS, 8 >> i, GROUP, WIDE, MB, BN, BK, EVEN, STAGES
            )
            y0, y1, y2, y3 = y0 + a0, y1 + a1, y2 + a2, y3 + a3
    store(y, y0, bias, xs, m, n, split, M, N, SPLIT)
    if MB > 1:
        store(y, y1, bias, xs, m + 1, n, split, M, N, SPLIT)
    if MB > 2:
        store(y, y2, bias, xs, m + 2, n, split, M, N, SPLIT)
        store(y, y3, bias, xs, m + 3, n, split, M, N, SPLIT)
