"""Low-rank linear for a few rows: both stages in one launch, or in two; dense factors in bf16, fp16 or fp32.

Maths      o[m, r] = sum_k b[r, k] x[m, k];   y[m, n] = sum_r a[n, r] o[m, r] + sum_j a[n, R + j] x[m, channels[j]] + bias[n].
Layout     x (M, K) rows `stride` apart; b (R, K), a (N, R + C) row-major; workspace fp32 (SPLIT, M, R): each split's share of o; y (M, N).
           Items of a stage: tiles of BR rows by BK columns, the accumulators (BR, BK) summed once after the loop; MB rows of x share a load of w.
Bytes      both factors once from memory; the workspace, SPLIT M R 4, is written once and read by every program of the second stage from L2.
Grid       P programs, at most two per multiprocessor, which all are resident at up to 255 registers for 128 threads; program p takes items p,
           p + P, ... of each stage, and a barrier of an atomic counter lies between. The last program to leave sets it back to zero: nothing
           to clear before a graph replay. Without the barrier (two launches): one program per item.
Limits     M any, meant for M <= 8. Launches that share a counter must not run at the same time: there is one counter per stream.
Numerics   fp32 throughout, shares added in the order of the splits: equal inputs give bit-equal outputs.
Reference  lowering/lowrank_linear.py: lowrank_reference.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(w, xv, acc):  # type: ignore[no-untyped-def]
    """acc (BR, BK) plus a tile of w times one row of x (BK,)."""
    return acc + w * xv[None, :]


@triton.jit
def row_of(x, m, k, M, K, stride):  # type: ignore[no-untyped-def]
    """Columns k of row m of x as fp32, zeros outside; rows past the last read the last, and are not stored."""
    return tl.load(x + tl.minimum(m, M - 1).to(tl.int64) * stride + k, mask=k < K, other=0.0).to(tl.float32)


@triton.jit
def first_item(x, b, workspace, item, M, R, K, stride, columns, BR: tl.constexpr, BK: tl.constexpr, MB: tl.constexpr):  # type: ignore[no-untyped-def]
    """One split's share of o for BR ranks and MB rows of x. `columns` are those of a split, a multiple of BK."""
    tiles = tl.cdiv(R, BR)
    blocks = tl.cdiv(M, MB)
    m = item % blocks * MB
    r = item // blocks % tiles * BR + tl.arange(0, BR)
    split = item // (blocks * tiles)
    acc0 = tl.zeros((BR, BK), tl.float32)
    acc1 = tl.zeros((BR, BK), tl.float32)
    acc2 = tl.zeros((BR, BK), tl.float32)
    acc3 = tl.zeros((BR, BK), tl.float32)
    for start in range(split * columns, tl.minimum(K, (split + 1) * columns), BK):
        k = start + tl.arange(0, BK)
        w = tl.load(b + r.to(tl.int64)[:, None] * K + k[None, :], mask=(r < R)[:, None] & (k < K)[None, :], other=0.0, eviction_policy="evict_first")
        w = w.to(tl.float32)
        acc0 = product(w, row_of(x, m, k, M, K, stride), acc0)
        if MB > 1:
            acc1 = product(w, row_of(x, m + 1, k, M, K, stride), acc1)
        if MB > 2:
            acc2 = product(w, row_of(x, m + 2, k, M, K, stride), acc2)
            acc3 = product(w, row_of(x, m + 3, k, M, K, stride), acc3)
    to = workspace + (split * M + m).to(tl.int64) * R + r
    tl.store(to, tl.sum(acc0, 1), mask=r < R)
    if MB > 1:
        tl.store(to + R, tl.sum(acc1, 1), mask=(r < R) & (m + 1 + r * 0 < M))
    if MB > 2:
        tl.store(to + 2 * R, tl.sum(acc2, 1), mask=(r < R) & (m + 2 + r * 0 < M))
        tl.store(to + 3 * R, tl.sum(acc3, 1), mask=(r < R) & (m + 3 + r * 0 < M))


@triton.jit
def middle(workspace, x, channels, m, j, M, R, C, stride, SPLIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns j of row m of the second stage's input: o, and behind it the channels of x. From L2, not from a cache that other programs cannot see."""
    o = tl.zeros(j.shape, tl.float32)
    m = tl.minimum(m, M - 1)
    for split in tl.static_range(SPLIT):
        o += tl.load(workspace + (split * M + m).to(tl.int64) * R + j, mask=j < R, other=0.0, cache_modifier=".cg")
    if channels is not None:
        inside = (j >= R) & (j < R + C)
        k = tl.load(channels + j - R, mask=inside, other=0)
        o += tl.load(x + m.to(tl.int64) * stride + k, mask=inside, other=0.0).to(tl.float32)
    return o


@triton.jit
def finish(y, bias, acc, m, n, M, N):  # type: ignore[no-untyped-def]
    """Outputs n of row m from accumulators (BR, BK)."""
    total = tl.sum(acc, 1)
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + m.to(tl.int64) * N + n, total.to(y.dtype.element_ty), mask=(n < N) & (m + n * 0 < M))


@triton.jit
def second_item(  # type: ignore[no-untyped-def]
    x, a, channels, bias, workspace, y, item, M, N, R, C, stride, BR: tl.constexpr, BK: tl.constexpr, MB: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """BR outputs of MB rows."""
    blocks = tl.cdiv(M, MB)
    m = item % blocks * MB
    n = item // blocks * BR + tl.arange(0, BR)
    acc0 = tl.zeros((BR, BK), tl.float32)
    acc1 = tl.zeros((BR, BK), tl.float32)
    acc2 = tl.zeros((BR, BK), tl.float32)
    acc3 = tl.zeros((BR, BK), tl.float32)
    width = R + C
    for start in range(0, width, BK):
        j = start + tl.arange(0, BK)
        w = tl.load(a + n.to(tl.int64)[:, None] * width + j[None, :], mask=(n < N)[:, None] & (j < width)[None, :], other=0.0, eviction_policy="evict_first")
        w = w.to(tl.float32)
        acc0 = product(w, middle(workspace, x, channels, m, j, M, R, C, stride, SPLIT), acc0)
        if MB > 1:
            acc1 = product(w, middle(workspace, x, channels, m + 1, j, M, R, C, stride, SPLIT), acc1)
        if MB > 2:
            acc2 = product(w, middle(workspace, x, channels, m + 2, j, M, R, C, stride, SPLIT), acc2)
            acc3 = product(w, middle(workspace, x, channels, m + 3, j, M, R, C, stride, SPLIT), acc3)
    finish(y, bias, acc0, m, n, M, N)
    if MB > 1:
        finish(y, bias, acc1, m + 1, n, M, N)
    if MB > 2:
        finish(y, bias, acc2, m + 2, n, M, N)
        finish(y, bias, acc3, m + 3, n, M, N)


@triton.jit
def barrier(counter, programs):  # type: ignore[no-untyped-def]
    """Wait until all programs have come here; `counter` is two zeros before and after."""
    tl.debug_barrier()  # this program's stores, before its arrival is announced
    tl.atomic_add(counter, 1, sem="release", scope="gpu")
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < programs:
        pass
    if tl.atomic_add(counter + 1, 1, sem="acq_rel", scope="gpu") == programs - 1:  # all have seen the count
        tl.atomic_xchg(counter, 0, sem="relaxed", scope="gpu")
        tl.atomic_xchg(counter + 1, 0, sem="release", scope="gpu")
    tl.debug_barrier()


@triton.jit
def first_kernel(x, b, workspace, M, R, K, stride, columns, BR: tl.constexpr, BK: tl.constexpr, MB: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first of two launches: one item a program."""
    first_item(x, b, workspace, tl.program_id(0), M, R, K, stride, columns, BR, BK, MB)


@triton.jit
def second_kernel(  # type: ignore[no-untyped-def]
    x, a, channels, bias, workspace, y, M, N, R, C, stride, BR: tl.constexpr, BK: tl.constexpr, MB: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """The second of two launches."""
    second_item(x, a, channels, bias, workspace, y, tl.program_id(0), M, N, R, C, stride, BR, BK, MB, SPLIT)


@triton.jit
def fused_kernel(  # type: ignore[no-untyped-def]
    x, a, b, channels, bias, workspace, counter, y, M, N, R, C, K, stride, columns,
    BR: tl.constexpr, BK: tl.constexpr, MB: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Both stages in one launch of resident programs."""
    programs = tl.num_programs(0)
    blocks = tl.cdiv(M, MB)
    for item in range(tl.program_id(0), blocks * tl.cdiv(R, BR) * SPLIT, programs):
        first_item(x, b, workspace, item, M, R, K, stride, columns, BR, BK, MB)
    barrier(counter, programs)
    for item in range(tl.program_id(0), blocks * tl.cdiv(N, BR), programs):
        second_item(x, a, channels, bias, workspace, y, item, M, N, R, C, stride, BR, BK, MB, SPLIT)
