"""One stage of a low-rank linear for many rows, on the matrix cores; two launches make the linear.

Maths      y[m, n] = sum_k w[n, k] z[m, k] + bias[n], z = x, or for the second stage the intermediate with channels of x behind it.
           Pivots (N) say where outputs n go: of `out`, where given, which then has the bias, beside y as above without; else of y.
Layout     z (M, R) rows `ldz` apart, x (M, K) rows `ldx` apart, w (N, R + C) row-major, channels and pivots int64; y, out rows `ldy`, `ldo` apart.
Bytes      w * ceil(M / BM) and z * ceil(N / BN), mostly from L2;  2 M N (R + C) flops.
Grid       (ceil(M / BM) * ceil(N / BN),), M fastest so that neighbours share tiles of w in L2.
Limits     BM, BN, BK >= 16.
Numerics   fp32 accumulation, one rounding to y's dtype; fp32 operands are multiplied in IEEE fp32, not tf32.
Reference  lowering/lowrank_linear.py: lowrank_reference.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def stage_kernel(  # type: ignore[no-untyped-def]
    z, x, w, channels, pivots, bias, y, out, M, N, R, C, ldz, ldx, ldy, ldo,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One (BM, BN) tile of outputs."""
    rows = tl.cdiv(M, BM)
    m = tl.program_id(0) % rows * BM + tl.arange(0, BM)
    n = tl.program_id(0) // rows * BN + tl.arange(0, BN)
    width = R + C
    zrow = z + m.to(tl.int64)[:, None] * ldz
    wrow = w + n.to(tl.int64)[None, :] * width
    acc = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(0, width, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        zt = tl.load(zrow + k[None, :], mask=(m < M)[:, None] & (k < R)[None, :], other=0.0)
        if channels is not None:
            inside = (k >= R) & (k < width)
            at = tl.load(channels + k - R, mask=inside, other=0)
            more = tl.load(x + m.to(tl.int64)[:, None] * ldx + at[None, :], mask=(m < M)[:, None] & inside[None, :], other=0.0)
            zt = tl.where((k < R)[None, :], zt, more.to(zt.dtype))
        wt = tl.load(wrow + k[:, None], mask=(k < width)[:, None] & (n < N)[None, :], other=0.0).to(zt.dtype)
        acc += tl.dot(zt, wt, input_precision="ieee")
    inside = (m < M)[:, None] & (n < N)[None, :]
    rows64 = m.to(tl.int64)[:, None]
    to = n
    if pivots is not None:
        to = tl.load(pivots + n, mask=n < N, other=0)
    if out is not None:
        tl.store(y + rows64 * ldy + n[None, :], acc.to(y.dtype.element_ty), mask=inside)
    if bias is not None:
        acc += tl.load(bias + to, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if out is not None:
        tl.store(out + rows64 * ldo + to[None, :], acc.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(y + rows64 * ldy + to[None, :], acc.to(y.dtype.element_ty), mask=inside)
