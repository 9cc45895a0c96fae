"""Attention over a compressed cache on a GPU: what the kernels of all page formats share.

Maths      o = softmax(scale * q [K^ ; K]^T + mask) [V^ ; V]: pages of packed tokens [0, flushed), then the dense ring [flushed, total).
Layout     runtime/caches/paging.py. Everything is transposed: scores (BT, BM) = K (BT, D) q^T (D, BM), acc (D, BM) += V^T (D, BT) weights, so the
           unpacked operand is the large side of a matrix product and the BM columns, R query heads by Q queries of one key head, the small one.
Grid       (B * G, SPLITS + 1): SPLITS programs share a key head's packed tokens evenly, however many there are, the last one takes the ring. Each leaves
           (acc, largest score, sum of weights); kv_merge_kernel adds them up in order: equal inputs give equal bits.
Lengths    are read on the device: nothing is copied to the host, and a captured graph stays right while tokens are appended.
Numerics   fp32 scores, sums and merge; products take the queries' dtype, fp32 in full precision. NaN in what is attended gives NaN; a row that attends to
           nothing is zero.
Reference  lowering/kv_cache.py: attend_reference.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def queries(q, lane, c, G, qb, qh, qq, R: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, BM: tl.constexpr):  # type: ignore[no-untyped-def]
    """q^T (channels c, BM) of a key head; zeros outside."""
    r = tl.arange(0, BM)
    at = (lane // G).to(tl.int64) * qb + (lane % G * R + r // Q).to(tl.int64) * qh + (r % Q).to(tl.int64) * qq
    return tl.load(q + at[None, :] + c[:, None], mask=(c < D)[:, None] & (r < R * Q)[None, :], other=0.0)


@triton.jit
def masked(s, mask, lane, t, there, G, mb, mh, mq, mk, scale, R: tl.constexpr, Q: tl.constexpr, MASK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scores (tokens t, BM) as exponents of two, -inf where not attended; `scale` holds log2 e.

    MASK 0 none, 1 bool, 2 additive, 3 and 4 bool and additive by token alone.
    """
    s = s * scale
    seen = there[:, None]
    if MASK > 2:  # one row of the mask serves all heads and queries
        m = tl.load(mask + (lane // G).to(tl.int64) * mb + t.to(tl.int64) * mk, mask=there, other=0)
        if MASK == 3:
            seen = (there & (m != 0))[:, None]
        else:
            m = m.to(tl.float32)[:, None]
            s = tl.where(m == float("-inf"), m, s + m * 1.4426950408889634)
    elif MASK > 0:
        r = tl.arange(0, s.shape[1])
        row = (lane // G).to(tl.int64) * mb + (lane % G * R + r // Q).to(tl.int64) * mh + (r % Q).to(tl.int64) * mq
        inside = seen & (r < R * Q)[None, :]
        m = tl.load(mask + t.to(tl.int64)[:, None] * mk + row[None, :], mask=inside, other=0)
        if MASK == 1:
            seen = inside & (m != 0)
        else:
            m = m.to(tl.float32)
            s = tl.where(m == float("-inf"), m, s + m * 1.4426950408889634)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def weigh(s, top, total):  # type: ignore[no-untyped-def]
    """Online softmax: weights of scores (BT, BM), by how much earlier sums shrink, the new largest score and sum."""
    high = tl.maximum(top, tl.max(s, 0))
    safe = tl.where(high == float("-inf"), 0.0, high)
    p = tl.exp2(s - safe[None, :])
    shrink = tl.exp2(top - safe)
    return p, shrink, high, total * shrink + tl.sum(p, 0)


@triton.jit
def near(  # type: ignore[no-untyped-def]
    q, ring, mask, acc, top, total, lane, flushed, length, G, W, qb, qh, qq, mb, mh, mq, mk, scale,
    R: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """The dense tokens [flushed, length) of one key head into acc (D padded, BM), channels in the model's order."""
    c = tl.arange(0, acc.shape[0])
    turned = queries(q, lane, c, G, qb, qh, qq, R, Q, D, BM)
    keys = ring + (lane // G * 2 * G + lane % G).to(tl.int64) * W * D
    values = keys + tl.full((), 1, tl.int64) * G * W * D
    for first in range(flushed, length, BT):
        t = first + tl.arange(0, BT)
        there = t < length
        slot = t % W * D
        inside = there[:, None] & (c < D)[None, :]
        k = tl.load(keys + slot[:, None] + c[None, :], mask=inside, other=0.0).to(q.dtype.element_ty)
        s = masked(tl.dot(k, turned, input_precision="ieee"), mask, lane, t, there, G, mb, mh, mq, mk, scale, R, Q, MASK)
        p, shrink, top, total = weigh(s, top, total)
        v = tl.load(values + slot[None, :] + c[:, None], mask=there[None, :] & (c < D)[:, None], other=0.0).to(q.dtype.element_ty)
        acc = acc * shrink[None, :] + tl.dot(v, p.to(v.dtype), input_precision="ieee")
    return acc, top, total


@triton.jit
def leave(part, stats, acc, top, total, lane, split, c, D: tl.constexpr, SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store a program's share: acc's rows are channels c."""
    BM: tl.constexpr = acc.shape[1]
    r = tl.arange(0, BM)
    slot = lane.to(tl.int64) * (SPLITS + 1) + split
    tl.store(part + (slot * D + c[:, None]) * BM + r[None, :], acc, mask=(c < D)[:, None])
    tl.store(stats + slot * 2 * BM + r, top)
    tl.store(stats + (slot * 2 + 1) * BM + r, total)


@triton.jit
def kv_merge_kernel(  # type: ignore[no-untyped-def]
    part, stats, out, G, R: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, SP: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """o (B, H, Q, D) of the shares: sum of 2^(m_i - m) acc_i over sum of 2^(m_i - m) l_i. Grid (B * G, ceil(D / BD))."""
    lane = tl.program_id(0)
    c = tl.program_id(1) * BD + tl.arange(0, BD)
    r = tl.arange(0, BM)
    i = tl.arange(0, SP)
    slot = lane.to(tl.int64) * (SPLITS + 1)
    there = (i < SPLITS + 1)[:, None]
    at = stats + (slot + i)[:, None] * 2 * BM + r[None, :]
    tops = tl.load(at, mask=there, other=float("-inf"))
    high = tl.max(tops, 0)
    safe = tl.where(high == float("-inf"), 0.0, high)
    total = tl.sum(tl.exp2(tops - safe[None, :]) * tl.load(at + BM, mask=there, other=0.0), 0)
    acc = tl.zeros((BD, BM), tl.float32)
    for n in range(SPLITS + 1):
        weight = tl.exp2(tl.load(stats + (slot + n) * 2 * BM + r) - safe)
        acc += weight[None, :] * tl.load(part + ((slot + n) * D + c[:, None]) * BM + r[None, :], mask=(c < D)[:, None], other=0.0)
    acc = acc / tl.where(total == 0.0, 1.0, total)[None, :]
    head = lane // G * G * R + lane % G * R + r // Q
    to = out + (head.to(tl.int64) * Q + r % Q)[None, :] * D + c[:, None]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(c < D)[:, None] & (r < R * Q)[None, :])
