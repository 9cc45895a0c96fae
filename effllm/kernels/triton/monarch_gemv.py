"""Monarch GEMV: a few rows of activations through both block-diagonal factors, in one launch or in two.

Maths      z[m, o, i T + r] = sum_p w1[(i O + o) T + r, p] x[m, i P + p]        y[m, n] = sum_c w2[o S + j, c] z[m, o, c] + bias[n]
           n = o S + j, strided form j O + o; outputs past N are not written, columns past K are zero.
Layout     x (M, K) rows `stride` apart, fp16, bf16 or fp32; w1 (I O T, P), w2 (O S, I T) row-major fp16, bf16 or fp32; z fp32 (M, O, I T), a
           workspace of a few KB that stays in L2; y (M, N) in x's dtype.
Bytes      (I O T P + O S I T) itemsize; 2 M flops a value.
Grid       fused_kernel: (programs,), all resident at once; each takes every programs-th tile of BN rows, first of w1, then of w2.
           first_kernel, second_kernel: (tiles of the stage, ceil(M / MB)).
Barrier    A program that is done with its share of stage 1 adds one to counter[0] and waits until all have. Having passed, it adds one to
           counter[1]; the last to do so sets both back to zero, since nobody waits any more: the next launch, or the next replay of a graph,
           finds them zero. Two launches that may overlap must not share a counter (monarch_launch.py).
Limits     MB in 1, 2, 4. z is written whole in every call, never accumulated, so it needs no clearing.
Numerics   fp32 throughout, one rounding to y's dtype. No atomics on values: equal inputs give bit-equal outputs.
Reference  lowering/monarch_linear.py: reference.    Source: arXiv 2512.20861 (order of the middle axis); the single launch is ours.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_sum(w, x, row, inside, K, limit, stride, M, first, MB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, SHARED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows (BN,) of w, K columns, times up to four vectors of `limit` values: four (BN,) fp32 tensors; those past MB are zero.

    SHARED: the vectors were written by other programs of this launch, so they are read past the multiprocessor's own cache.
    """
    column = tl.arange(0, BK)
    acc0 = tl.zeros((BN, BK), tl.float32)
    acc1 = tl.zeros((BN, BK), tl.float32)
    acc2 = tl.zeros((BN, BK), tl.float32)
    acc3 = tl.zeros((BN, BK), tl.float32)
    x0 = x + first * stride
    x1 = x + tl.minimum(first + 1, M - 1) * stride
    x2 = x + tl.minimum(first + 2, M - 1) * stride
    x3 = x + tl.minimum(first + 3, M - 1) * stride
    cache: tl.constexpr = ".cg" if SHARED else ""
    base = w + row.to(tl.int64)[:, None] * K
    for k in tl.range(0, K, BK, num_stages=STAGES):
        c = k + column
        wt = tl.load(base + c[None, :], mask=inside[:, None] & (c < K)[None, :], other=0.0).to(tl.float32)
        acc0 += wt * tl.load(x0 + c, mask=c < limit, other=0.0, cache_modifier=cache).to(tl.float32)[None, :]
        if MB > 1:
            acc1 += wt * tl.load(x1 + c, mask=c < limit, other=0.0, cache_modifier=cache).to(tl.float32)[None, :]
        if MB > 2:
            acc2 += wt * tl.load(x2 + c, mask=c < limit, other=0.0, cache_modifier=cache).to(tl.float32)[None, :]
            acc3 += wt * tl.load(x3 + c, mask=c < limit, other=0.0, cache_modifier=cache).to(tl.float32)[None, :]
    return tl.sum(acc0, 1), tl.sum(acc1, 1), tl.sum(acc2, 1), tl.sum(acc3, 1)


@triton.jit
def first_tile(x, w1, z, tile, m, M, K, P, T, I, O, stride, MB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr):  # type: ignore[no-untyped-def]
    """One tile of stage 1: BN rows of a block's (O T, P) matrix."""
    tiles = tl.cdiv(O * T, BN)
    i = tile // tiles
    q = (tile % tiles) * BN + tl.arange(0, BN)
    inside = q < O * T
    limit = tl.minimum(P, K - i * P)
    a0, a1, a2, a3 = rows_sum(w1, x + i * P, i * O * T + q, inside, P, limit, stride, M, m, MB, BN, BK, STAGES, False)
    width = O * I * T
    row = m + tl.zeros_like(q)
    to = z + (q // T) * (I * T) + i * T + q % T
    tl.store(to + m * width, a0, mask=inside)
    if MB > 1:
        tl.store(to + (m + 1) * width, a1, mask=inside & (row + 1 < M))
    if MB > 2:
        tl.store(to + (m + 2) * width, a2, mask=inside & (row + 2 < M))
        tl.store(to + (m + 3) * width, a3, mask=inside & (row + 3 < M))


@triton.jit
def second_tile(  # type: ignore[no-untyped-def]
    z, w2, bias, y, tile, m, M, N, S, T, I, O,
    STRIDED: tl.constexpr, MB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of stage 2: BN rows of a class's (S, I T) matrix, and the outputs they are."""
    tiles = tl.cdiv(S, BN)
    o = tile // tiles
    j = (tile % tiles) * BN + tl.arange(0, BN)
    inside = j < S
    width = I * T
    a0, a1, a2, a3 = rows_sum(w2, z + o * width, o * S + j, inside, width, width, O * width, M, m, MB, BN, BK, STAGES, True)
    n = j * O + o if STRIDED else o * S + j
    inside = inside & (n < N)
    if bias is not None:
        b = tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
        a0 += b
        a1 += b
        a2 += b
        a3 += b
    row = m + tl.zeros_like(n)
    to = y + n
    tl.store(to + m * N, a0.to(y.dtype.element_ty), mask=inside)
    if MB > 1:
        tl.store(to + (m + 1) * N, a1.to(y.dtype.element_ty), mask=inside & (row + 1 < M))
    if MB > 2:
        tl.store(to + (m + 2) * N, a2.to(y.dtype.element_ty), mask=inside & (row + 2 < M))
        tl.store(to + (m + 3) * N, a3.to(y.dtype.element_ty), mask=inside & (row + 3 < M))


@triton.jit
def wait_for_all(counter, programs):  # type: ignore[no-untyped-def]
    """Return when every program of the grid has come here; what any of them stored before is then visible to all."""
    tl.debug_barrier()  # all threads of this program have stored
    arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") + 1
    while arrived < programs:
        arrived = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()
    if tl.atomic_add(counter + 1, 1, sem="acq_rel", scope="gpu") == programs - 1:
        tl.store(counter, 0)
        tl.store(counter + 1, 0)


@triton.jit
def fused_kernel(  # type: ignore[no-untyped-def]
    x, w1, w2, bias, z, y, counter, M, N, K, P, S, T, I, O, stride, programs,
    STRIDED: tl.constexpr, MB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Both stages of up to MB rows."""
    pid = tl.program_id(0)
    for tile in range(pid, I * tl.cdiv(O * T, BN), programs):
        first_tile(x, w1, z, tile, 0, M, K, P, T, I, O, stride, MB, BN, BK, STAGES)
    wait_for_all(counter, programs)
    for tile in range(pid, O * tl.cdiv(S, BN), programs):
        second_tile(z, w2, bias, y, tile, 0, M, N, S, T, I, O, STRIDED, MB, BN, BK, STAGES)


@triton.jit
def first_kernel(x, w1, z, M, K, P, T, I, O, stride, MB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Stage 1 alone."""
    first_tile(x, w1, z, tl.program_id(0), tl.program_id(1) * MB, M, K, P, T, I, O, stride, MB, BN, BK, STAGES)


@triton.jit
def second_kernel(  # type: ignore[no-untyped-def]
    z, w2, bias, y, M, N, S, T, I, O, STRIDED: tl.constexpr, MB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """Stage 2 alone."""
    second_tile(z, w2, bias, y, tl.program_id(0), tl.program_id(1) * MB, M, N, S, T, I, O, STRIDED, MB, BN, BK, STAGES)
