"""Put the outputs of a weight with pivoted rows in their places, where its two stages were products of their own.

Maths      y[m, pivots[i]] = concat(z, rest)[m, i] + bias[pivots[i]]
Layout     z (M, R), rest (M, N - R), y (M, N) row-major; pivots int64 (N), a permutation.
Bytes      2 M N itemsize and the pivots.
Grid       (ceil(N / BN), M): one segment of a row per program.
Limits     none.
Numerics   the bias is added in fp32, then one rounding to y's dtype.
Reference  lowering/lowrank_linear.py: placed.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place_kernel(z, rest, pivots, bias, y, N, R, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    """One segment of a row."""
    i = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1).to(tl.int64)
    value = tl.load(z + m * R + i, mask=i < R, other=0.0).to(tl.float32)
    value += tl.load(rest + m * (N - R) + i - R, mask=(i >= R) & (i < N), other=0.0).to(tl.float32)
    to = tl.load(pivots + i, mask=i < N, other=0)
    if bias is not None:
        value += tl.load(bias + to, mask=i < N, other=0.0).to(tl.float32)
    tl.store(y + m * N + to, value.to(y.dtype.element_ty), mask=i < N)
