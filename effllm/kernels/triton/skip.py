"""Linears that skip channels on a GPU, for decoding: by input and by output, over floating-point values or codes.

Maths      as lowering/sparse_linear.py and sparse_bipolar_linear.py. A program looks at BS channels at once, counts those that pass in order,
           and walks them BK (by output BN) at a time, found by halving in the counts: what is skipped costs neither loads nor the instructions that
           decode and multiply. Their number stays on the device: no sync, static shapes and grid, safe in a captured graph.
Layout     weight_t (K, N) by input, weight (N, K) by output, row-major; codes (K, U, 64) input_major, (N, U, 64) row_major; x (M, K).
Bytes      the rows that pass, once per row of x (rows of one call meet in the second-level cache), and the scales of codes.
Grid       by input (ceil(N / BN), SPLIT, M), shares added by splitk.py in order; by output (ceil(N / BS), M): an inactive tile reads nothing.
Limits     powers of two; BS is at most 128 and divides a group where there are codes (groups of 16 and more), BK divides BS.
Numerics   fp32 sums in a fixed order, no atomics: equal inputs give equal bits. NaN passes every threshold.
Reference  lowering/sparse_linear.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from effllm.kernels.triton.epilogue import store


@triton.jit
def passes(v, threshold, norm, at, inside, EACH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the magnitudes v of channels `at` are not at most their thresholds."""
    size = tl.abs(v)
    if norm is not None:
        size *= tl.load(norm + at, mask=inside, other=0.0)
    t = tl.load(threshold + at, mask=inside, other=0.0) if EACH else tl.load(threshold)
    # a comparison with NaN is false, so NaN is not below
    return inside & ((size <= t) == 0)


@triton.jit
def nth(below, c, BS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Positions of the c-th channels that are on, of `below` (BS,): how many are on up to each; found by halving."""
    at = c * 0
    for i in tl.static_range(7):  # BS is at most 128
        if BS >> (i + 1) > 0:
            at += tl.where(tl.gather(below, at + (BS >> (i + 1)) - 1, 0) <= c, BS >> (i + 1), 0)
    return at


@triton.jit
def skip_input_kernel(  # type: ignore[no-untyped-def]
    x, threshold, norm, weight, scale, minimum, u, z, bias, y, M, N, K, stride, units, width, tiles, rank, zero,
    EACH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """One row and BN outputs over one split of K; BITS is 0 for values, else the stored width of a code."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    m = tl.program_id(2)
    row = x + m.to(tl.int64) * stride
    acc = tl.zeros((BN,), tl.float32)
    if BITS > 0:
        per: tl.constexpr = 8 // BITS
        unit = n // (512 // BITS)
        field = n % (512 // BITS) // 16
        byte = unit * 64 + n % 16 // 4 * 16 + field // per * 4 + n % 4
        shift = (field % per * BITS)[None, :]
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(K, BS))):
        k = tile * BS + tl.arange(0, BS)
        v = tl.load(row + k, mask=k < K, other=0.0).to(tl.float32)
        on = passes(v, threshold, norm, k, k < K, EACH)
        below = tl.cumsum(on.to(tl.int32), 0)
        count = tl.sum(on.to(tl.int32), 0)
        if BITS > 0:
            chain = tl.zeros((BN,), tl.float32)
        for first in range(0, count, BK):
            c = first + tl.arange(0, BK)
            inside = c < count
            channel = tile * BS + nth(below, c, BS)
            a = tl.load(row + channel, mask=inside, other=0.0).to(tl.float32)
            some = inside[:, None] & (n < N)[None, :]
            if BITS > 0:
                from_ = weight + channel.to(tl.int64)[:, None] * (units * 64) + byte[None, :]
                code = tl.load(from_, mask=some, other=0, eviction_policy="evict_first").to(tl.int32)
                code = (code >> shift) & (2**BITS - 1)
                chain += tl.sum(code.to(tl.float32) * a[:, None], 0)
            else:
                w = tl.load(weight + channel.to(tl.int64)[:, None] * N + n[None, :], mask=some, other=0.0, eviction_policy="evict_first").to(tl.float32)
                acc += tl.sum(w * a[:, None], 0)
        if BITS > 0:
            g = tile * BS // GROUP if GROUP > 0 else 0
            step = 2.0 * tl.load(scale + g * width + n, mask=n < N, other=0.0).to(tl.float32)
            total = tl.sum(tl.where(on, v, 0.0), 0)
            if minimum is not None:
                acc += step * chain + tl.load(minimum + g * width + n, mask=n < N, other=0.0).to(tl.float32) * total
            else:
                acc += step * (chain - zero * total)
    if z is not None:  # noqa: SIM102 - decided when compiled, the inner one by the program
        if split == 0:
            for first in range(0, rank, BR):
                r = first + tl.arange(0, BR)
                part = tl.load(z + m * rank + r, mask=r < rank, other=0.0)
                wide = tl.load(u + n.to(tl.int64)[:, None] * rank + r[None, :], mask=(n < N)[:, None] & (r < rank)[None, :], other=0.0).to(tl.float32)
                acc += tl.sum(wide * part[None, :], 1)
    store(y, acc, bias, None, m, n, split, M, N, SPLIT)


@triton.jit
def skip_rest_kernel(x, threshold, norm, v, z, K, stride, rank, EACH: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr):  # type: ignore[no-untyped-def]
    """z (M, r) = v times what of x does not pass. Grid (ceil(r / BR), M)."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    m = tl.program_id(1)
    acc = tl.zeros((BR,), tl.float32)
    for first in range(0, K, BK):
        k = first + tl.arange(0, BK)
        a = tl.load(x + m.to(tl.int64) * stride + k, mask=k < K, other=0.0).to(tl.float32)
        a = tl.where(passes(a, threshold, norm, k, k < K, EACH), 0.0, a)
        w = tl.load(v + r.to(tl.int64)[:, None] * K + k[None, :], mask=(r < rank)[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
        acc += tl.sum(w * a[None, :], 1)
    tl.store(z + m * rank + r, acc, mask=r < rank)


@triton.jit
def skip_output_kernel(  # type: ignore[no-untyped-def]
    x, gate, threshold, weight, scale, minimum, bias, y, N, K, stride, units, groups, zero,
    EACH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BS outputs of one row: those that the gate passes, BN at a time; the others are zero."""
    start = tl.program_id(0) * BS
    m = tl.program_id(1).to(tl.int64)
    every = start + tl.arange(0, BS)
    on = passes(tl.load(gate + m * N + every, mask=every < N, other=0.0).to(tl.float32), threshold, None, every, every < N, EACH)
    tl.store(y + m * N + every, tl.zeros((BS,), y.dtype.element_ty), mask=(every < N) & (on == 0))
    below = tl.cumsum(on.to(tl.int32), 0)
    count = tl.sum(on.to(tl.int32), 0)
    for chunk in range(0, count, BN):
        c = chunk + tl.arange(0, BN)
        here = c < count
        n = start + nth(below, c, BS)
        a = tl.load(gate + m * N + n, mask=here, other=0.0).to(tl.float32)
        acc = tl.zeros((BN,), tl.float32)
        for first in range(0, K, BK):
            k = first + tl.arange(0, BK)
            v = tl.load(x + m * stride + k, mask=k < K, other=0.0).to(tl.float32)
            inside = here[:, None] & (k < K)[None, :]
            if BITS > 0:
                columns: tl.constexpr = 512 // BITS
                byte = k // columns * 64 + k % 64
                shift = (k % columns // 64 * BITS)[None, :]
                at = weight + n.to(tl.int64)[:, None] * (units * 64) + byte[None, :]
                code = tl.load(at, mask=inside, other=0, eviction_policy="evict_first").to(tl.int32)
                code = (code >> shift) & (2**BITS - 1)
                g = first // GROUP if GROUP > 0 else 0
                step = 2.0 * tl.load(scale + n * groups + g, mask=here, other=0.0).to(tl.float32)
                total = tl.sum(v, 0)
                chain = tl.sum(code.to(tl.float32) * v[None, :], 1)
                if minimum is not None:
                    acc += step * chain + tl.load(minimum + n * groups + g, mask=here, other=0.0).to(tl.float32) * total
                else:
                    acc += step * (chain - zero * total)
            else:
                at = weight + n.to(tl.int64)[:, None] * K + k[None, :]
                w = tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
                acc += tl.sum(w * v[None, :], 1)
        if bias is not None:
            acc += tl.load(bias + n, mask=here, other=0.0).to(tl.float32)
        tl.store(y + m * N + n, (a * acc).to(y.dtype.element_ty), mask=here)
