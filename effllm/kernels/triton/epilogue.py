"""The end of every linear kernel: the finished row, or one split's share of it.

Maths      y[m, n] = xs[m] * total[m, n] + bias[n], rounded once to y's dtype; with SPLIT > 1 the fp32 total goes to the workspace
           and splitk.py adds the shares in the order of the splits.
Layout     y (M, N) row-major; workspace fp32 (SPLIT, M, N) in y's place; bias (N,); xs fp32 (M,).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store(y, total, bias, xs, m, n, split, M, N, SPLIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write outputs n (BN,) of row m, or (BM, BN) of rows m (BM, 1), from an fp32 tile of the same shape."""
    m += tl.zeros_like(n)
    inside = (m < M) & (n < N)
    if SPLIT > 1:
        tl.store(y + (split * M + m).to(tl.int64) * N + n, total, mask=inside)
    else:
        if xs is not None:
            total *= tl.load(xs + m, mask=m < M, other=0.0)
        if bias is not None:
            total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(y + m.to(tl.int64) * N + n, total.to(y.dtype.element_ty), mask=inside)
