"""2:4 weights on a GPU: decoding, small matrix products and expansion, over floating-point values or codes of 4 and 8 bits.

Maths      y[m, n] = sum over kept columns of x[m, k] w[n, k]; coded w = 2 s (u - zero) or 2 s u + minimum, groups along the compressed axis
           ARMOR: x is B x already (block_kernel), and the finished (BN,) outputs go through their block of A before the store.
Layout     runtime/layouts/nm_words.py; x (M, K) rows `stride` apart; left (N, BN), right (K, BLOCK) rows of blocks; y, workspace as epilogue.py.
Bytes      N K itemsize / 2 + N K / 8 (+ scales);  2 M N K / 2 flops.
GEMV       grid (ceil(N / BN), SPLIT, M): tiles of R index words (8 R groups) by BN outputs. A kept weight meets one of four activations,
           chosen by its two index bits with three selects: on the ordinary cores nothing is expanded.
GEMM       grid (ceil(M / BM) * ceil(N / BN), SPLIT): BH groups at a time become four columns each in registers, one tl.dot for each
           of the four places of a group against the activations of that place.
Limits     BN = BLOCK with ARMOR; BH >= 16. Splits are added by splitk.py or finish_kernel, no atomics.
Numerics   fp32 sums. GEMM and expansion round coded weights to x's dtype once, as the reference does; the wrapper A multiplies fp32 sums,
           in the GEMM rounded to x's dtype.
Reference  lowering/nm_linear.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from effllm.kernels.triton.epilogue import store


@triton.jit
def choose(pair, x0, x1, x2, x3):  # type: ignore[no-untyped-def]
    """The activation that two index bits name."""
    odd = (pair & 1) != 0
    return tl.where((pair & 2) != 0, tl.where(odd, x3, x2), tl.where(odd, x1, x0))


@triton.jit
def kept(values, h, n, NP, H, inside, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both kept numbers of groups h (rows) and outputs n, as stored: codes as fp32."""
    at = values + h[:, None] * NP + n[None, :]
    first = tl.load(at, mask=inside, other=0, eviction_policy="evict_first")
    if BITS == 4:
        return (first & 15).to(tl.float32), (first >> 4).to(tl.float32)
    else:
        second = tl.load(at + H * NP, mask=inside, other=0, eviction_policy="evict_first")
        if BITS == 8:
            return first.to(tl.float32), second.to(tl.float32)
        else:
            return first, second


@triton.jit
def scales(scale, minimum, g, n, NP, inside, zero):  # type: ignore[no-untyped-def]
    """Step and value of code 0 of scale groups g (rows) and outputs n."""
    at = g[:, None] * NP + n[None, :]
    step = tl.load(scale + at, mask=inside, other=0.0).to(tl.float32) * 2.0
    if minimum is not None:
        return step, tl.load(minimum + at, mask=inside, other=0.0).to(tl.float32)
    else:
        return step, -zero * step


@triton.jit
def through(total, left, n, N, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One block of A times the outputs (BLOCK,) of its rows n."""
    c = tl.arange(0, BLOCK)
    a = tl.load(left + n[:, None] * BLOCK + c[None, :], mask=(n < N)[:, None], other=0.0).to(tl.float32)
    return tl.sum(a * total[None, :], 1)


@triton.jit
def nm_gemv_kernel(  # type: ignore[no-untyped-def]
    x, values, scale, minimum, index, left, bias, y, M, N, K, NP, H, stride, tiles, zero,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr, R: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One row and BN outputs over one split of K."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    m = tl.program_id(2)
    r = tl.arange(0, R)
    acc = tl.zeros((R, BN), tl.float32)
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(H, 8 * R))):
        row = tile * R + r
        inside = (row < H // 8)[:, None] & (n < NP)[None, :]
        word = tl.load(index + row[:, None] * NP + n[None, :], mask=inside, other=0, eviction_policy="evict_first")
        chain = tl.zeros((R, BN), tl.float32)
        total = tl.zeros((R, BN), tl.float32)
        for j in tl.static_range(8):
            h = row * 8 + j
            k = h * 4
            at = x + m.to(tl.int64) * stride + k
            x0 = tl.load(at, mask=k < K, other=0.0).to(tl.float32)[:, None]
            x1 = tl.load(at + 1, mask=k + 1 < K, other=0.0).to(tl.float32)[:, None]
            x2 = tl.load(at + 2, mask=k + 2 < K, other=0.0).to(tl.float32)[:, None]
            x3 = tl.load(at + 3, mask=k + 3 < K, other=0.0).to(tl.float32)[:, None]
            v0, v1 = kept(values, h, n, NP, H, inside, BITS)
            a = choose(word >> (4 * j), x0, x1, x2, x3)
            b = choose(word >> (4 * j + 2), x0, x1, x2, x3)
            chain += v0.to(tl.float32) * a
            chain += v1.to(tl.float32) * b
            if BITS > 0:
                total += a + b
        if BITS > 0:
            g = row * 16 // GROUP if GROUP > 0 else row * 0
            step, low = scales(scale, minimum, g, n, NP, inside, zero)
            acc += chain * step + total * low
        else:
            acc += chain
    out = tl.sum(acc, 0)
    if BLOCK > 0 and SPLIT == 1:
        out = through(out, left, n, N, BLOCK)
    store(y, out, bias, None, m, n, split, M, N, SPLIT)


@triton.jit
def nm_gemm_kernel(  # type: ignore[no-untyped-def]
    x, values, scale, minimum, index, left, bias, y, M, N, K, NP, H, stride, tiles, zero,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """BM rows and BN outputs over one split of K."""
    blocks = tl.cdiv(M, BM)
    m = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    n = tl.program_id(0) // blocks * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    acc = tl.zeros((BM, BN), tl.float32)
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(H, BH))):
        h = tile * BH + tl.arange(0, BH)
        inside = (h < H)[:, None] & (n < NP)[None, :]
        word = tl.load(index + (h // 8)[:, None] * NP + n[None, :], mask=inside, other=0)
        word = word >> (h % 8 * 4)[:, None]
        v0, v1 = kept(values, h, n, NP, H, inside, BITS)
        if BITS > 0:
            g = h * 2 // GROUP if GROUP > 0 else h * 0
            step, low = scales(scale, minimum, g, n, NP, inside, zero)
            v0 = v0 * step + low
            v1 = v1 * step + low
        v0 = v0.to(x.dtype.element_ty)
        v1 = v1.to(x.dtype.element_ty)
        for j in tl.static_range(4):
            k = h * 4 + j
            xj = tl.load(x + m.to(tl.int64)[:, None] * stride + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
            wj = tl.where((word & 3) == j, v0, tl.where(((word >> 2) & 3) == j, v1, 0.0).to(v0.dtype))
            acc = tl.dot(xj, wj, acc, input_precision="ieee")
    if BLOCK > 0 and SPLIT == 1:
        a = tl.load(left + n[None, :] * BLOCK + tl.arange(0, BLOCK)[:, None], mask=(n < N)[None, :], other=0.0)
        acc = tl.dot(acc.to(x.dtype.element_ty), a.to(x.dtype.element_ty), input_precision="ieee")
    store(y, acc, bias, None, m[:, None], n[None, :], split, M, N, SPLIT)


@triton.jit
def finish_kernel(workspace, left, bias, y, M, N, SPLIT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """ARMOR after split-K: sum the shares of one block of outputs in order, through A, and finish. Grid (N / BLOCK, M)."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = tl.program_id(1)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLIT):
        total += tl.load(workspace + (split * M + m).to(tl.int64) * N + n)
    store(y, through(total, left, n, N, BLOCK), bias, None, m, n, 0, M, N, 1)


@triton.jit
def block_kernel(x, right, u, K, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """u (M, K) = B x in x's dtype. Grid (K / BLOCK, M)."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = tl.program_id(1).to(tl.int64)
    v = tl.load(x + m * stride + k).to(tl.float32)
    tl.store(u + m * K + k, through(v, right, k, K, BLOCK).to(u.dtype.element_ty))


@triton.jit
def nm_dense_kernel(  # type: ignore[no-untyped-def]
    values, scale, minimum, index, w, N, K, NP, H, zero, BITS: tl.constexpr, GROUP: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr
):
    """The dense weight (K, N) row-major, BH groups by BN outputs: for prefill by the vendor's product."""
    h = tl.program_id(0) * BH + tl.arange(0, BH)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (h < H)[:, None] & (n < NP)[None, :]
    word = tl.load(index + (h // 8)[:, None] * NP + n[None, :], mask=inside, other=0) >> (h % 8 * 4)[:, None]
    v0, v1 = kept(values, h, n, NP, H, inside, BITS)
    if BITS > 0:
        g = h * 2 // GROUP if GROUP > 0 else h * 0
        step, low = scales(scale, minimum, g, n, NP, inside, zero)
        v0 = v0 * step + low
        v1 = v1 * step + low
    v0 = v0.to(w.dtype.element_ty)
    v1 = v1.to(w.dtype.element_ty)
    for j in tl.static_range(4):
        k = h * 4 + j
        wj = tl.where((word & 3) == j, v0, tl.where(((word >> 2) & 3) == j, v1, 0.0).to(v0.dtype))
        tl.store(w + k.to(tl.int64)[:, None] * N + n[None, :], wj, mask=(k < K)[:, None] & (n < N)[None, :])
