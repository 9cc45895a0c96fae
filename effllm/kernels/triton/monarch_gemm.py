"""Monarch GEMM: many rows of activations through both factors on the matrix cores, without a permutation between the two.

Maths      as monarch_gemv.py.
Layout     x (M, K) rows `stride` apart; w1 (I O T, P), w2 (O S, I T) row-major, all of x's dtype; z (O, M, I T) of x's dtype; y (M, N).
           Stage 1 computes column q of block i, which is r = q % T of class o = q // T, and stores it at z[o, m, i T + r]: what stage 2
           multiplies is contiguous, so neither stage needs a copy.
Bytes      the factors once per row tile from L2, 2 M O I T itemsize for z; 2 M flops a value.
Grid       (ceil(M / BM) * I * ceil(O T / BN),) and (ceil(M / BM) * O * ceil(S / BN),), rows fastest so that neighbours share weights in L2.
Limits     BM, BN, BK >= 16. T below 16 or odd costs nothing here: columns of several classes share a tile.
Numerics   fp32 accumulation, z rounded to x's dtype. fp32 x is multiplied in IEEE fp32, not tf32.
Reference  lowering/monarch_linear.py: reference.    Source: arXiv 2512.20861.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(a, w, m, row, inside, M, K, limit, stride, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows m (BM,) of a, `limit` columns, times rows (BN,) of w, K columns: (BM, BN) fp32."""
    column = tl.arange(0, BK)
    left = a + m.to(tl.int64)[:, None] * stride
    right = w + row.to(tl.int64)[None, :] * K
    acc = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        c = k + column
        at = tl.load(left + c[None, :], mask=(m < M)[:, None] & (c < limit)[None, :], other=0.0)
        wt = tl.load(right + c[:, None], mask=(c < K)[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(at, wt, acc, input_precision="ieee")
    return acc


@triton.jit
def first_gemm(x, w1, z, M, K, P, T, I, O, stride, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr):  # type: ignore[no-untyped-def]
    """One tile of stage 1, stored where stage 2 reads it."""
    rows = tl.cdiv(M, BM)
    m = (tl.program_id(0) % rows) * BM + tl.arange(0, BM)
    tile = tl.program_id(0) // rows
    tiles = tl.cdiv(O * T, BN)
    i = tile // tiles
    q = (tile % tiles) * BN + tl.arange(0, BN)
    inside = q < O * T
    acc = product(x + i * P, w1, m, i * O * T + q, inside, M, P, tl.minimum(P, K - i * P), stride, BM, BN, BK, STAGES)
    to = z + (q // T).to(tl.int64)[None, :] * M * (I * T) + m[:, None] * (I * T) + (i * T + q % T)[None, :]
    tl.store(to, acc.to(z.dtype.element_ty), mask=(m < M)[:, None] & inside[None, :])


@triton.jit
def second_gemm(  # type: ignore[no-untyped-def]
    z, w2, bias, y, M, N, S, T, I, O, STRIDED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """One tile of stage 2."""
    rows = tl.cdiv(M, BM)
    m = (tl.program_id(0) % rows) * BM + tl.arange(0, BM)
    tile = tl.program_id(0) // rows
    tiles = tl.cdiv(S, BN)
    o = tile // tiles
    j = (tile % tiles) * BN + tl.arange(0, BN)
    width = I * T
    acc = product(z + o.to(tl.int64) * M * width, w2, m, o * S + j, j < S, M, width, width, width, BM, BN, BK, STAGES)
    n = j * O + o if STRIDED else o * S + j
    inside = (j < S) & (n < N)
    if bias is not None:
        acc += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(y + m.to(tl.int64)[:, None] * N + n[None, :], acc.to(y.dtype.element_ty), mask=(m < M)[:, None] & inside[None, :])
