"""Dense weight from packed words: for prefill, where one dense product of the vendor's library beats unpacking per tile.

Maths      w[k, n] = 2 s[g, n] (u[k, n] - zero), or 2 s[g, n] u[k, n] + minimum[g, n], rounded once to w's dtype.
Layout     codes, scale, minimum as runtime/layouts/words.py; w (K, N) row-major, so that y = x @ w.
Bytes      N K BITS / 8 + N G itemsize (1 + affine) read, N K itemsize written.
Grid       (ceil(K / BK), ceil(N / BN)).
Limits     BK >= 32. Costs the dense weight's bytes for the time of one call.
Numerics   fp32 (the compiler may fuse the affine multiply-add), one rounding to w's dtype: the reference's weight.
Reference  lowering/bipolar_linear.py: weight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from effllm.kernels.triton.fields import tile


@triton.jit
def dense_kernel(codes, scale, minimum, w, N, K, NP, KB, zero, BITS: tl.constexpr, GROUP: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    """One (BK, BN) tile of the dense weight."""
    CENTRE: tl.constexpr = 2 ** (BITS - 1)
    index = tl.program_id(0)
    k = index * BK + tl.arange(0, BK)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (k < K)[:, None] & (n < N)[None, :]
    u = tile(codes, index, n, NP, KB, BITS, BK, BN, CENTRE, tl.float16).to(tl.float32)
    g = k // GROUP if GROUP > 0 else k * 0
    at = g[:, None] * NP + n[None, :]
    s2 = tl.load(scale + at, mask=inside, other=0.0).to(tl.float32) * 2.0
    value = (u - (zero - CENTRE)) * s2
    if minimum is not None:
        value = (u + CENTRE) * s2 + tl.load(minimum + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(w + k.to(tl.int64)[:, None] * N + n[None, :], value.to(w.dtype.element_ty), mask=inside)
