"""Attention over Matryoshka pages on a GPU (see kv_parts.py): keys and values projected onto the leading columns of a basis per key head.

Maths      q . (mean + z U_r^T) = q . mean + (q U_r) . z, so the query is projected once and keys are read as stored; values alike, by
           sum_t p_t (mean + z_t U_r^T) = total mean + (sum_t p_t z_t) U_r^T at the end of a split.
Layout     runtime/caches/matryoshka.py: one record for all heads; sides (2, G + 1) int32 are the running sums of the ranks of keys and of values. Bases
           (G, D, D) and means (G, D) fp32.
Tiles      64 tokens, or a page where that is smaller, by RP ranks (the largest of all heads, padded); bases in pieces of BD channels.
Bytes      the page once, each program both bases once (from the second-level cache).
Limits     ranks of up to 256.
Numerics   the projected query and the sums over z are fp32; products with z take the queries' dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl

from effllm.kernels.triton.kv_parts import leave, masked, near, queries, weigh


@triton.jit
def kv_matryoshka_kernel(  # type: ignore[no-untyped-def]
    q, values, uk, mk_, uv, mv_, sides, ring, lens, mask, part, stats, P, page_bytes, record, G, W, qb, qh, qq, mb, mh, mq, mk, scale,
    R: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, MASK: tl.constexpr, SPLITS: tl.constexpr,
    PAGE: tl.constexpr, RP: tl.constexpr, BD: tl.constexpr, VAT: tl.constexpr,
):  # fmt: skip
    """One key head's packed tokens of one split, or its ring. VAT is the byte offset of the values in a page."""
    lane, split = tl.program_id(0), tl.program_id(1)
    length, flushed = tl.load(lens).to(tl.int32), tl.load(lens + 1).to(tl.int32)
    DTYPE: tl.constexpr = q.dtype.element_ty
    SIZE: tl.constexpr = values.dtype.element_ty.primitive_bitwidth // 8
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    if split == SPLITS:
        whole = tl.zeros((DP, BM), tl.float32)
        whole, top, total = near(q, ring, mask, whole, top, total, lane, flushed, length, G, W, qb, qh, qq, mb, mh, mq, mk, scale, R, Q, D, BM, BT, MASK)
        leave(part, stats, whole, top, total, lane, split, tl.arange(0, DP), D, SPLITS)
    else:
        g = lane % G
        j = tl.arange(0, RP)
        kfrom, vfrom = tl.load(sides + g), tl.load(sides + G + 1 + g)
        kr, vr = tl.load(sides + g + 1) - kfrom, tl.load(sides + G + 2 + g) - vfrom
        turned = tl.zeros((RP, BM), tl.float32)
        rest = tl.zeros((BM,), tl.float32)
        for first in range(0, D, BD):
            c = first + tl.arange(0, BD)
            some = queries(q, lane, c, G, qb, qh, qq, R, Q, D, BM).to(tl.float32)
            u = tl.load(uk + (g * D + c[None, :]).to(tl.int64) * D + j[:, None], mask=(c < D)[None, :] & (j < kr)[:, None], other=0.0)
            turned = tl.dot(u, some, turned, input_precision="ieee")
            rest += tl.sum(tl.load(mk_ + g * D + c, mask=c < D, other=0.0)[:, None] * some, 0)
        narrow = turned.to(DTYPE)
        acc = tl.zeros((RP, BM), tl.float32)
        n = tl.arange(0, BT)
        base = (lane // G).to(tl.int64) * P * page_bytes
        tiles = flushed // BT
        for i in range(tiles * split // SPLITS, tiles * (split + 1) // SPLITS):
            at = (base + tl.full((), 1, tl.int64) * (i * BT // PAGE) * page_bytes) // SIZE
            own = i * BT % PAGE + n
            z = tl.load(values + at + PAGE * kfrom + own[:, None] * kr + j[None, :], mask=(j < kr)[None, :], other=0.0).to(DTYPE)
            s = tl.dot(z, narrow, input_precision="ieee") + rest[None, :]
            s = masked(s, mask, lane, i * BT + n, n < BT, G, mb, mh, mq, mk, scale, R, Q, MASK)
            p, shrink, top, total = weigh(s, top, total)
            z = tl.load(values + at + VAT // SIZE + PAGE * vfrom + own[None, :] * vr + j[:, None], mask=(j < vr)[:, None], other=0.0).to(DTYPE)
            acc = tl.dot(z, p.to(DTYPE), acc * shrink[None, :], input_precision="ieee")
        for first in range(0, D, BD):
            c = first + tl.arange(0, BD)
            u = tl.load(uv + (g * D + c[:, None]).to(tl.int64) * D + j[None, :], mask=(c < D)[:, None] & (j < vr)[None, :], other=0.0)
            mean = tl.load(mv_ + g * D + c, mask=c < D, other=0.0)
            leave(part, stats, tl.dot(u, acc, input_precision="ieee") + mean[:, None] * total[None, :], top, total, lane, split, c, D, SPLITS)
