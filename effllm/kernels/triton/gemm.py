"""Packed GEMM: many rows of activations times a bipolar weight of 1 to 8 bits, on the matrix cores.

Maths      y[m, n] = sum_g s2 (dot_g[m, n] - (zero - c) sum_{k in g} x[m, k])                       symmetric and integer, s2 = 2 s[g, n]
                   = sum_g s2 dot_g[m, n] + (minimum[g, n] + s2 c) sum_{k in g} x[m, k]             affine
           dot_g = x_g @ (u_g - c), c = 2^(BITS - 1) (bf16 below 8 bits: -128, see fields.py): small integers, exact in fp16, bf16 and int8.
Layout     x (M, K) rows `stride` apart, fp16, bf16, fp32 or int8; codes, scale, minimum as runtime/layouts/words.py; y, workspace as epilogue.py.
           Tile: x (BM, BK) @ codes (BK, BN). Where a group is shorter than BK, x is masked to each group in turn (BK / GROUP dots).
Bytes      N K BITS / 8 * ceil(M / BM) from L2 + N G itemsize (1 + affine) + M K itemsize * ceil(N / BN) from L2 + M N itemsize;  2 M N K flops.
Grid       (ceil(M / BM) * ceil(N / BN), SPLIT), M fastest so that neighbours share weight tiles in L2; splits are added by splitk.py, no atomics.
Limits     BM >= 16, BK >= 32, GROUP divides BK or BK divides GROUP. int8 products are summed exactly in int32.
Numerics   fp32 accumulation; scales multiply fp32 sums, so a weight is never rounded to 16 bits. fp32 x is multiplied in IEEE fp32, not tf32.
Reference  lowering/bipolar_linear.py: linear_reference, linear_a8_reference.
"""

from __future__ import annotations

import triton
import triton.language as tl

from effllm.kernels.triton.epilogue import store
from effllm.kernels.triton.fields import tile


@triton.jit
def gemm_kernel(  # type: ignore[no-untyped-def]
    x, codes, scale, minimum, bias, xs, y, M, N, K, NP, KB, stride, tiles, zero,
    BITS: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One (BM, BN) tile of outputs over one split of K."""
    SUB: tl.constexpr = BK // GROUP if GROUP > 0 and GROUP < BK else 1
    CENTRE: tl.constexpr = -128 if x.dtype.element_ty == tl.bfloat16 and BITS < 8 else 2 ** (BITS - 1)
    rows = tl.cdiv(M, BM)
    m = (tl.program_id(0) % rows) * BM + tl.arange(0, BM)
    n = (tl.program_id(0) // rows) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    column = tl.arange(0, BK)
    xrow = x + m.to(tl.int64)[:, None] * stride
    first = split * tiles
    last = tl.minimum(first + tiles, tl.cdiv(KB * 32, BK))
    acc = tl.zeros((BM, BN), tl.float32)
    for index in tl.range(first, last, num_stages=STAGES):
        k = index * BK + column
        xt = tl.load(xrow + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0)
        w = tile(codes, index, n, NP, KB, BITS, BK, BN, CENTRE, xt.dtype)
        for sub in tl.static_range(SUB):
            xg = xt
            if SUB > 1:
                xg = tl.where((column // GROUP == sub)[None, :], xt, tl.zeros_like(xt))
            if xt.dtype == tl.int8:
                dot = tl.dot(xg, w).to(tl.float32)
                xsum = tl.sum(xg.to(tl.int32), axis=1).to(tl.float32)
            else:
                dot = tl.dot(xg, w, input_precision="ieee")
                xsum = tl.sum(xg.to(tl.float32), axis=1)
            if GROUP > 0:
                at = ((index * BK) // GROUP + sub) * NP + n
                inside = (n < NP) & (at < (KB * 32 // GROUP) * NP)
            else:
                at = n
                inside = n < NP
            s2 = tl.load(scale + at, mask=inside, other=0.0).to(tl.float32) * 2.0
            if minimum is None:
                acc += (dot - xsum[:, None] * (zero - CENTRE)) * s2[None, :]
            else:
                low = tl.load(minimum + at, mask=inside, other=0.0).to(tl.float32)
                acc += dot * s2[None, :] + xsum[:, None] * (low + s2 * CENTRE)[None, :]
    store(y, acc, bias, xs, m[:, None], n[None, :], split, M, N, SPLIT)
