"""Attention of a few queries over keys stored for other positions: the query is turned back, keys are read as they lie.

Maths      q . R(a) k = R(-a) q . k; R turns the first 2 P channels by pairs: (c, c + P) for "half", (2c, 2c + 1) for "interleaved"; the others pass.
Layout     q (B, H, Q, D), k and v (B, G, S, D) with strides and a dense last dimension; row int32 or int64 (S), cos and sin fp32 (A, P), rounded from
           fp64 angles. Scores and shares as in kv_parts.py: (tokens, queries), merged by kv_merge_kernel.
Grid       (B * G, SPLITS + 1), the tiles of BT keys shared evenly.
Segments   a tile turns the query once for each table row that its keys use and keeps the scores of the keys of that row: edited texts consist of few runs
           of one shift each, so nearly all tiles have one. The last turned query is kept from tile to tile.
Bytes      keys and values once, as without turns.
Limits     rows are not checked against the table: that would read them on the host.
Numerics   a query is turned in fp32; for 16-bit keys it is split into two numbers of their dtype, so 2^-16 of it is lost, not 2^-8.
Reference  lowering/pie.py: rotated_attention_reference.
"""

from __future__ import annotations

import triton
import triton.language as tl

from effllm.kernels.triton.kv_parts import leave, masked, queries, weigh


@triton.jit
def turned(x, y, cos, sin, current, c, P, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """R(-row) of queries x (channels c, BM), y the partners of their channels."""
    pair = tl.where(c < P, c, c - P) if HALF else c // 2
    first = (c < P) if HALF else (c % 2 == 0)
    at = current.to(tl.int64) * P + pair
    co = tl.load(cos + at, mask=c < 2 * P, other=1.0)
    si = tl.load(sin + at, mask=c < 2 * P, other=0.0)
    return x * co[:, None] + y * tl.where(first, si, -si)[:, None]


@triton.jit
def products(k, x):  # type: ignore[no-untyped-def]
    """k (BT, D) times fp32 x (D, BM), at x's precision."""
    if k.dtype.is_fp32():
        return tl.dot(k, x, input_precision="ieee")
    else:
        high = x.to(k.dtype)
        return tl.dot(k, (x - high.to(tl.float32)).to(k.dtype), tl.dot(k, high))


@triton.jit
def rotated_attention_kernel(  # type: ignore[no-untyped-def]
    q, k, v, mask, row, cos, sin, part, stats, S, G, P, qb, qh, qq, kb, kg, ks, vb, vg, vs, mb, mh, mq, mk, scale,
    R: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, MASK: tl.constexpr, HALF: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """One key head's share of the keys."""
    lane, split = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, DP)
    n = tl.arange(0, BT)
    x = queries(q, lane, c, G, qb, qh, qq, R, Q, D, BM).to(tl.float32)
    partner = tl.where(c < P, c + P, c - P) if HALF else tl.where(c % 2 == 0, c + 1, c - 1)
    y = queries(q, lane, tl.where(c < 2 * P, partner, D), G, qb, qh, qq, R, Q, D, BM).to(tl.float32)
    keys = k + (lane // G).to(tl.int64) * kb + (lane % G).to(tl.int64) * kg
    values = v + (lane // G).to(tl.int64) * vb + (lane % G).to(tl.int64) * vg
    acc = tl.zeros((DP, BM), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    tiles = tl.cdiv(S, BT)
    first = tiles * split // (SPLITS + 1)
    last = tiles * (split + 1) // (SPLITS + 1)
    NONE: tl.constexpr = 0x7FFFFFFF
    held = tl.load(row + first * BT, mask=first < last, other=0).to(tl.int32)
    back = turned(x, y, cos, sin, held, c, P, HALF)
    for i in range(first, last):
        t = i * BT + n
        there = t < S
        inside = there[:, None] & (c < D)[None, :]
        kk = tl.load(keys + t.to(tl.int64)[:, None] * ks + c[None, :], mask=inside, other=0.0)
        rows = tl.load(row + t, mask=there, other=NONE).to(tl.int32)
        current = tl.min(rows, 0)
        if current != held:
            held = current
            back = turned(x, y, cos, sin, held, c, P, HALF)
        s = products(kk, back)
        current = tl.min(tl.where(rows > current, rows, NONE), 0)
        while current != NONE:
            held = current
            back = turned(x, y, cos, sin, held, c, P, HALF)
            s = tl.where((rows >= current)[:, None], products(kk, back), s)
            current = tl.min(tl.where(rows > current, rows, NONE), 0)
        s = masked(s, mask, lane, t, there, G, mb, mh, mq, mk, scale, R, Q, MASK)
        p, shrink, top, total = weigh(s, top, total)
        vv = tl.load(values + t.to(tl.int64)[None, :] * vs + c[:, None], mask=there[None, :] & (c < D)[:, None], other=0.0)
        acc = tl.dot(vv, p.to(vv.dtype), acc * shrink[None, :], input_precision="ieee")
    leave(part, stats, acc, top, total, lane, split, c, D, SPLITS)
