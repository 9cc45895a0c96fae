"""Low-rank linears for a few rows: both stages in one launch, or in two; up to four siblings that share x; dense factors in bf16, fp16 or fp32.

Maths      o[m, r] = sum_k b[r, k] x[m, k];   y[m, n] = sum_r a[n, r] o[m, r] + sum_j a[n, R + j] x[m, channels[j]] + bias[n].
           With pivots (R + N): output pivots[r] is o[m, r] and output pivots[R + n] what n is above, each plus the bias of its own place.
Layout     x (M, K) rows `stride` apart; b (R, K), a (N, R + C) row-major; workspace fp32 (SPLIT, M, LDW): each split's share of o, siblings
           side by side, LDW the sum of their ranks; y rows LDY apart, the outputs of siblings side by side.
           Items of a stage: tiles of BR rows by BK columns, the accumulators (BR, BK) summed once after the loop; MB rows of x share a load of w.
           Where rows are pivoted, the second stage has items of BK ranks more, which copy o to its outputs.
Bytes      the factors once from memory; the workspace, SPLIT M LDW 4, is written once and read by every program of the second stage from L2.
Grid       P programs, at most two per multiprocessor, which all are resident at up to 255 registers for 128 threads; the items of a stage, all
           siblings' in a row, go round: program p takes items p, p + P, ..., and a barrier of an atomic counter lies between the stages. The last
           program to leave sets it back to zero: nothing to clear before a graph replay. Without the barrier (two launches): one program per item.
Limits     M any, meant for M <= 8. Launches that share a counter must not run at the same time: there is one counter per stream.
Numerics   fp32 throughout, shares added in the order of the splits: equal inputs give bit-equal outputs.
Reference  lowering/lowrank_linear.py: lowrank_reference, lowrank_many_reference.
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
def first_item(  # type: ignore[no-untyped-def]
    x, b, workspace, item, M, R, K, stride, columns, LDW, BR: tl.constexpr, BK: tl.constexpr, MB: tl.constexpr
):  # fmt: skip
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
    to = workspace + (split * M + m).to(tl.int64) * LDW + r
    tl.store(to, tl.sum(acc0, 1), mask=r < R)
    if MB > 1:
        tl.store(to + LDW, tl.sum(acc1, 1), mask=(r < R) & (m + 1 + r * 0 < M))
    if MB > 2:
        tl.store(to + 2 * LDW, tl.sum(acc2, 1), mask=(r < R) & (m + 2 + r * 0 < M))
        tl.store(to + 3 * LDW, tl.sum(acc3, 1), mask=(r < R) & (m + 3 + r * 0 < M))


@triton.jit
def middle(workspace, x, channels, m, j, M, R, C, stride, LDW, SPLIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns j of row m of the second stage's input: o, and behind it the channels of x. From L2, not from a cache that other programs cannot see."""
    o = tl.zeros(j.shape, tl.float32)
    m = tl.minimum(m, M - 1)
    for split in tl.static_range(SPLIT):
        o += tl.load(workspace + (split * M + m).to(tl.int64) * LDW + j, mask=j < R, other=0.0, cache_modifier=".cg")
    if channels is not None:
        inside = (j >= R) & (j < R + C)
        k = tl.load(channels + j - R, mask=inside, other=0)
        o += tl.load(x + m.to(tl.int64) * stride + k, mask=inside, other=0.0).to(tl.float32)
    return o


@triton.jit
def put(y, bias, value, m, to, inside, LDY):  # type: ignore[no-untyped-def]
    """Values of row m to outputs `to`, with their bias."""
    if bias is not None:
        value += tl.load(bias + to, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + m.to(tl.int64) * LDY + to, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def finish(y, pivots, bias, acc, m, n, M, N, R, LDY):  # type: ignore[no-untyped-def]
    """Outputs n of row m from accumulators (BR, BK)."""
    to = n
    if pivots is not None:
        to = tl.load(pivots + R + n, mask=n < N, other=0)
    put(y, bias, tl.sum(acc, 1), m, to, (n < N) & (m + n * 0 < M), LDY)


@triton.jit
def second_item(  # type: ignore[no-untyped-def]
    x, a, channels, pivots, bias, workspace, y, item, M, N, R, C, stride, LDW, LDY,
    BR: tl.constexpr, BK: tl.constexpr, MB: tl.constexpr, SPLIT: tl.constexpr,
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
        acc0 = product(w, middle(workspace, x, channels, m, j, M, R, C, stride, LDW, SPLIT), acc0)
        if MB > 1:
            acc1 = product(w, middle(workspace, x, channels, m + 1, j, M, R, C, stride, LDW, SPLIT), acc1)
        if MB > 2:
            acc2 = product(w, middle(workspace, x, channels, m + 2, j, M, R, C, stride, LDW, SPLIT), acc2)
            acc3 = product(w, middle(workspace, x, channels, m + 3, j, M, R, C, stride, LDW, SPLIT), acc3)
    finish(y, pivots, bias, acc0, m, n, M, N, R, LDY)
    if MB > 1:
        finish(y, pivots, bias, acc1, m + 1, n, M, N, R, LDY)
    if MB > 2:
        finish(y, pivots, bias, acc2, m + 2, n, M, N, R, LDY)
        finish(y, pivots, bias, acc3, m + 3, n, M, N, R, LDY)


@triton.jit
def copy_item(pivots, bias, workspace, y, item, M, R, LDW, LDY, BK: tl.constexpr, SPLIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """BK values of the intermediate of one row, which are outputs."""
    m = item % M
    r = item // M * BK + tl.arange(0, BK)
    o = middle(workspace, workspace, None, m, r, M, R, 0, 0, LDW, SPLIT)
    put(y, bias, o, m, tl.load(pivots + r, mask=r < R, other=0), r < R, LDY)


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
def begin(before, programs):  # type: ignore[no-untyped-def]
    """This program's first item of a list that `before` items precede, where all items go round."""
    return (tl.program_id(0) + programs - before % programs) % programs


@triton.jit
def first_stage(  # type: ignore[no-untyped-def]
    x, b, workspace, before, M, R, K, stride, columns, LDW, BR: tl.constexpr, BK: tl.constexpr, MB: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """This program's items of one sibling; returns the number of items up to here."""
    items = tl.cdiv(M, MB) * tl.cdiv(R, BR) * SPLIT
    for item in range(begin(before, tl.num_programs(0)), items, tl.num_programs(0)):
        first_item(x, b, workspace, item, M, R, K, stride, columns, LDW, BR, BK, MB)
    return before + items


@triton.jit
def second_stage(  # type: ignore[no-untyped-def]
    x, a, channels, pivots, bias, workspace, y, before, M, N, R, C, stride, LDW, LDY,
    BR: tl.constexpr, BK: tl.constexpr, MB: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """As `first_stage`, with the copies of pivoted rows."""
    programs = tl.num_programs(0)
    items = tl.cdiv(M, MB) * tl.cdiv(N, BR)
    for item in range(begin(before, programs), items, programs):
        second_item(x, a, channels, pivots, bias, workspace, y, item, M, N, R, C, stride, LDW, LDY, BR, BK, MB, SPLIT)
    done = before + items
    if pivots is not None:
        copies = M * tl.cdiv(R, BK)
        for item in range(begin(done, programs), copies, programs):
            copy_item(pivots, bias, workspace, y, item, M, R, LDW, LDY, BK, SPLIT)
        done += copies
    return done


@triton.jit
def lowrank_kernel(  # type: ignore[no-untyped-def]
    x, a0, a1, a2, a3, b0, b1, b2, b3, p0, p1, p2, p3, channels, bias, workspace, counter, y,
    M, N0, N1, N2, N3, R0, R1, R2, R3, C, K, stride, columns, LDW, LDY,
    BR: tl.constexpr, BK: tl.constexpr, MB: tl.constexpr, SPLIT: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """One to four siblings, the absent ones None. PART 0: both stages in one launch of resident programs, 1 and 2: one of them.

    N are the rows of the second factors. Siblings have no channels and no bias of their own: these are of a weight alone.
    """
    if PART != 2:
        before = first_stage(x, b0, workspace, 0, M, R0, K, stride, columns, LDW, BR, BK, MB, SPLIT)
        if b1 is not None:
            before = first_stage(x, b1, workspace + R0, before, M, R1, K, stride, columns, LDW, BR, BK, MB, SPLIT)
        if b2 is not None:
            before = first_stage(x, b2, workspace + R0 + R1, before, M, R2, K, stride, columns, LDW, BR, BK, MB, SPLIT)
        if b3 is not None:
            before = first_stage(x, b3, workspace + R0 + R1 + R2, before, M, R3, K, stride, columns, LDW, BR, BK, MB, SPLIT)
    if PART == 0:
        barrier(counter, tl.num_programs(0))
    if PART != 1:
        done = second_stage(x, a0, channels, p0, bias, workspace, y, 0, M, N0, R0, C, stride, LDW, LDY, BR, BK, MB, SPLIT)
        to = y + outputs(p0, N0, R0)
        if a1 is not None:
            done = second_stage(x, a1, None, p1, None, workspace + R0, to, done, M, N1, R1, 0, stride, LDW, LDY, BR, BK, MB, SPLIT)
            to += outputs(p1, N1, R1)
        if a2 is not None:
            done = second_stage(x, a2, None, p2, None, workspace + R0 + R1, to, done, M, N2, R2, 0, stride, LDW, LDY, BR, BK, MB, SPLIT)
            to += outputs(p2, N2, R2)
        if a3 is not None:
            done = second_stage(x, a3, None, p3, None, workspace + R0 + R1 + R2, to, done, M, N3, R3, 0, stride, LDW, LDY, BR, BK, MB, SPLIT)


@triton.jit
def outputs(pivots, N, R):  # type: ignore[no-untyped-def]
    """Outputs of a sibling."""
    return N if pivots is None else N + R
