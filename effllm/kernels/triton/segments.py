"""Attention by segments on a GPU: prompts, chunks and decoding steps of many sequences in one launch, no mask, no host reads.

Maths      o[t] = softmax(cap(scale q[t] k[j]^T)) v[j] over the keys of query t's segment up to its own, at most `window` of them.
Layout     q (1, H, T, D), k (1, Hk, P, D), v (1, Hk, P, DV), strides given, last dimension dense; table int32 (S, 4): q_start, q_len,
           k_start, k_len; out (1, T, H, DV) dense, zeroed before (queries of no segment stay zero).
Grid       (blocks, Hk), blocks = ceil(T / BQ) + S, which no table exceeds. A program adds up the blocks of the segments before it to find
           its own; those past the last leave at once. Its BM rows are BQ = BM / R queries of the R query heads that share a key head.
Skipping   a program's keys run from its first query's first to its last query's last: other segments, keys after the diagonal and keys
           out of the window are in no tile. Only tiles on an edge waste lanes.
Bytes      per program its keys and values once: 2 * keys * (D + DV) * itemsize.  Flops  4 H D sum of the keys that queries see.
Limits     R <= BM; D and DV are padded to powers of two in registers; decoding over a long cache has one program per segment and key
           head and no split over keys, so a few long sequences leave a large GPU idle.
Numerics   fp32 scores and sums, fp32 products in full precision; probabilities are rounded to v's dtype before the second product.
Reference  lowering/packed_attention.py.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def packed_attention_kernel(  # type: ignore[no-untyped-def]
    q, k, v, table, out, S, H, qh, qt, kh, kt, vh, vt, scale, softcap, window,
    R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, SP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """One block of rows of one segment and key head."""
    BQ: tl.constexpr = BM // R
    block, head = tl.program_id(0), tl.program_id(1)
    s = tl.arange(0, SP)
    lengths = tl.load(table + s * 4 + 1, mask=s < S, other=0)
    blocks = (lengths + BQ - 1) // BQ
    before = tl.cumsum(blocks, 0)
    mine = tl.sum((before <= block).to(tl.int32), 0)
    if mine < S:
        first = (block - tl.sum(tl.where(s < mine, blocks, 0), 0)) * BQ
        q_start, q_len = tl.load(table + mine * 4), tl.load(table + mine * 4 + 1)
        k_start, k_len = tl.load(table + mine * 4 + 2), tl.load(table + mine * 4 + 3)
        r = tl.arange(0, BM)
        query, d, e = first + r // R, tl.arange(0, DP), tl.arange(0, DVP)
        valid = (r < BQ * R) & (query < q_len)
        row_head = head * R + r % R
        at = q + row_head[:, None].to(tl.int64) * qh + (q_start + query)[:, None].to(tl.int64) * qt
        rows = tl.load(at + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0)
        last = tl.where(valid, k_len - q_len + query, -1)  # inclusive, counted from k_start
        lowest = 0
        if WINDOW:
            lowest = tl.maximum(k_len - q_len + first - window + 1, 0)
        highest = k_len - q_len + tl.minimum(first + BQ, q_len) - 1
        top = tl.full((BM,), float("-inf"), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        acc = tl.zeros((BM, DVP), tl.float32)
        keys = k + head.to(tl.int64) * kh + k_start.to(tl.int64) * kt
        values = v + head.to(tl.int64) * vh + k_start.to(tl.int64) * vt
        for j in range(lowest, highest + 1, BN):
            n = j + tl.arange(0, BN)
            there = n <= highest
            kk = tl.load(keys + n[None, :].to(tl.int64) * kt + d[:, None], mask=there[None, :] & (d < D)[:, None], other=0.0)
            score = tl.dot(rows, kk, input_precision="ieee" if IEEE else "tf32") * scale
            if CAP:
                score = softcap * (2.0 * tl.sigmoid(2.0 * score / softcap) - 1.0)
            seen = n[None, :] <= last[:, None]
            if WINDOW:
                seen &= n[None, :] > last[:, None] - window
            score = tl.where(seen, score * 1.4426950408889634, float("-inf"))
            high = tl.maximum(top, tl.max(score, 1))
            safe = tl.where(high == float("-inf"), 0.0, high)
            p = tl.exp2(score - safe[:, None])
            shrink = tl.exp2(top - safe)
            total = total * shrink + tl.sum(p, 1)
            vv = tl.load(values + n[:, None].to(tl.int64) * vt + e[None, :], mask=there[:, None] & (e < DV)[None, :], other=0.0)
            acc = acc * shrink[:, None] + tl.dot(p.to(vv.dtype), vv, input_precision="ieee" if IEEE else "tf32")
            top = high
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        to = out + ((q_start + query)[:, None].to(tl.int64) * H + row_head[:, None]) * DV + e[None, :]
        tl.store(to, acc.to(out.dtype.element_ty), mask=valid[:, None] & (e < DV)[None, :])
