"""Appending to a compressed cache on a GPU: where new tokens go, the dense ring, and the lengths. Nothing is read on the host.

Maths      end = total + n; flushed' = the least multiple of PAGE with end - flushed' <= W (at least flushed): runtime/caches/paging.py.
           Tokens [flushed, flushed') go to pages (kv_flush*.py), new ones from flushed' on into the ring, slot t % W, then the lengths are set.
Order      flush, ring, lengths: launches of one stream, each reads what the one before left. One program does ring and lengths of a decoding step.
Full       where end exceeds the capacity no kernel writes anything but `fault`, which the host sees (kv_append_launch.py).
Bytes      2 B G min(n, W) D itemsize read and written, and the pages.
Grid       ceil(rows / BR) programs, rows = 2 B G min(n, W) of D channels: (row of the batch, keys or values, head, token).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def plan(lens, n, W, limit, PAGE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tokens before, tokens in pages before and after, and whether n more fit."""
    total, flushed = tl.load(lens).to(tl.int32), tl.load(lens + 1).to(tl.int32)
    end = total + n
    until = tl.where(end > W, (end - W + PAGE - 1) // PAGE * PAGE, 0)
    return total, flushed, tl.maximum(flushed, until), end <= limit


@triton.jit
def taken(  # type: ignore[no-untyped-def]
    ring, fresh, start, first, own, c, inside, total, b, g, G, W, fb, fg, ft, SIDE: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr
):  # fmt: skip
    """Places `own` (any shape) of the page from token `first` on, channels c (of the same shape), in the ring's dtype.

    Padding takes the value of the first token of its page that is none, or zero, so that it widens no group's range.
    """
    lead = tl.minimum(tl.maximum(tl.load(start + b).to(tl.int32) - first, 0), PAGE)
    t = first + tl.where(own < lead, tl.minimum(lead, PAGE - 1), own)
    inside = inside & (own * 0 + lead < PAGE)
    old = inside & (t < total)
    held = tl.load(ring + ((b * 2 + SIDE) * G + g).to(tl.int64) * W * D + t % W * D + c, mask=old, other=0.0)
    new = tl.load(fresh + b.to(tl.int64) * fb + g.to(tl.int64) * fg + (t - total).to(tl.int64) * ft + c, mask=inside & (t >= total), other=0.0)
    return tl.where(old, held, new.to(held.dtype))


@triton.jit
def report(lens, fault, n, W, limit, PAGE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Set the lengths, or say what did not fit."""
    total, _, until, fits = plan(lens, n, W, limit, PAGE)
    tl.debug_barrier()  # every thread has read the lengths
    if fits:
        tl.store(lens, (total + n).to(tl.int64))
        tl.store(lens + 1, until.to(tl.int64))
    else:
        tl.store(fault + 1, total.to(tl.int64))
        tl.store(fault + 2, tl.full((), 0, tl.int64) + n)
        tl.store(fault + 3, tl.full((), 0, tl.int64) + limit)
        tl.store(fault, tl.full((), 1, tl.int64))


@triton.jit
def kv_ring_kernel(  # type: ignore[no-untyped-def]
    k, v, ring, lens, fault, n, B, G, W, limit, kb, kg, kt, vb, vg, vt,
    D: tl.constexpr, DP: tl.constexpr, BR: tl.constexpr, PAGE: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """BR rows; with LAST, where one program does all, the lengths too."""
    total, _, until, fits = plan(lens, n, W, limit, PAGE)
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    count = tl.minimum(n, W)  # of more tokens the first are in pages
    i = n - 1 - row % count
    side = row // count % 2
    g = row // (2 * count) % G
    b = row // (2 * count * G)
    c = tl.arange(0, DP)[None, :]
    live = (b < tl.where(fits, B, 0)) & (total + i >= until)
    inside = live[:, None] & (c < D)
    wide = b.to(tl.int64)
    keys = tl.load(k + (wide * kb + g * kg + i.to(tl.int64) * kt)[:, None] + c, mask=inside & (side == 0)[:, None], other=0.0)
    values = tl.load(v + (wide * vb + g * vg + i.to(tl.int64) * vt)[:, None] + c, mask=inside & (side == 1)[:, None], other=0.0)
    x = tl.where((side == 0)[:, None], keys, values)
    slot = ((wide * 2 + side) * G + g) * W + (total + i) % W
    tl.store(ring + slot[:, None] * D + c, x.to(ring.dtype.element_ty), mask=inside)
    if LAST:
        report(lens, fault, n, W, limit, PAGE)


@triton.jit
def kv_lens_kernel(lens, fault, n, W, limit, PAGE: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program, behind all of the ring."""
    report(lens, fault, n, W, limit, PAGE)
