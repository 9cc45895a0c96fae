"""Where the tokens of a cache are, and the plain-torch append and read of any format.

    pages  uint8 (B, P, page bytes)      tokens [0, flushed), `page` a page
    ring   dtype (B, 2, G, W, D)         keys and values of tokens [flushed, total); token t in slot t % W, W = window + page
    lens   int64 (2,)                    total, flushed
    start  int64 (B,)                    first token of each row that is no padding

Appending n tokens first moves whole pages out until the rest fits the ring: flushed = the smallest multiple of `page` with
total - flushed <= W. So after any append the newest min(total, window + 1) tokens are dense. Capacity is P * page + W.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effllm.errors import CacheError
from effllm.runtime.caches.base import CacheFormat


def pages_for(fmt: CacheFormat, tokens: int) -> int:
    """Pages of a cache that holds at least `tokens`."""
    return max(0, -(-(tokens - fmt.window - fmt.page) // fmt.page))


def capacity(fmt: CacheFormat, pages: int) -> int:
    """Most tokens that a cache of so many pages holds."""
    return pages * fmt.page + fmt.window + fmt.page


def flushed_after(fmt: CacheFormat, total: int, flushed: int) -> int:
    """Tokens in pages once there are `total`, of which `flushed` were there before."""
    return max(flushed, fmt.page * pages_for(fmt, total))


def check_room(total: int, more: int, limit: int) -> None:
    """Raise CacheError (E-KVC-FULL), before anything is written, where `more` tokens do not fit."""
    if total + more > limit:
        what = f"the cache holds {total} of {limit} tokens and {more} more are to be appended"
        what = what if total else f"a prompt of {more} tokens, and the cache holds {limit}"
        raise CacheError("E-KVC-FULL", what, "make the cache larger, let it grow, or crop or reset it; it is unchanged")


def neutral(x: Tensor, first: int, start: Tensor, page: int) -> Tensor:
    """x (B, G, S, D), tokens from position `first` on, S a multiple of `page`, with padding replaced inside each page.

    Padding would widen the range of the groups it is in. It takes the value of the first token of its page that is none, or zero.
    """
    if not bool((start > first).any()):
        return x
    b, g, s, d = x.shape
    at = torch.arange(s, device=x.device) + first  # position
    lead = (start[:, None] - at + at % page).clamp(0, page)  # padded tokens of the page that a position is in, (B, S)
    own = at % page
    source = torch.where(own < lead, at - first - own + lead.clamp(max=page - 1), at - first)
    taken = x.gather(2, source[:, None, :, None].expand(b, g, s, d))
    return torch.where((lead >= page)[:, None, :, None], torch.zeros_like(taken), taken)


def encode(fmt: CacheFormat, k: Tensor, v: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """Page bytes (B, N, page bytes) of keys and values (B, G, N * page, D)."""
    b, g, s, d = k.shape
    pages = [t.reshape(b, g, s // fmt.page, fmt.page, d).transpose(1, 2) for t in (k, v)]
    return fmt.layout(g, d, k.dtype).write(fmt.encode(pages[0], pages[1], tables))


def decode(fmt: CacheFormat, pages: Tensor, heads: int, dim: int, dtype: torch.dtype, tables: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values (B, G, P * page, D) in `dtype` of page bytes (B, P, page bytes)."""
    b, p, _ = pages.shape
    k, v = fmt.decode(fmt.layout(heads, dim, dtype).read(pages), tables)
    return tuple(t.to(dtype).transpose(1, 2).reshape(b, heads, p * fmt.page, dim) for t in (k, v))  # type: ignore[return-value]


def append(fmt: CacheFormat, pages: Tensor, ring: Tensor, lens: Tensor, start: Tensor, k: Tensor, v: Tensor, tables: Sequence[Tensor]) -> None:
    """Write keys and values (B, G, n, D) behind what is there, in place. Raises CacheError (E-KVC-FULL) before any write."""
    total, flushed = (int(i) for i in lens.tolist())
    n, width = k.shape[2], ring.shape[3]
    check_room(total, n, capacity(fmt, pages.shape[1]))
    end = total + n
    until = flushed_after(fmt, end, flushed)
    if until > flushed:
        old = torch.arange(flushed, min(total, until), device=ring.device) % width
        fresh = max(0, until - total)
        both = [torch.cat([ring[:, i, :, old], t[:, :, :fresh]], 2) for i, t in enumerate((k, v))]
        both = [neutral(t, flushed, start, fmt.page) for t in both]
        pages[:, flushed // fmt.page : until // fmt.page] = encode(fmt, both[0], both[1], tables)
    skip = max(0, until - total)
    slots = torch.arange(total + skip, end, device=ring.device) % width
    ring[:, 0, :, slots] = k[:, :, skip:]
    ring[:, 1, :, slots] = v[:, :, skip:]
    lens.copy_(torch.tensor([end, until], device=lens.device))


def read(fmt: CacheFormat, pages: Tensor, ring: Tensor, lens: Tensor, tables: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Dense keys and values (B, G, capacity, D) in the ring's dtype; what lies behind `total` is finite and means nothing."""
    _, _, g, width, d = ring.shape
    at = torch.arange(capacity(fmt, pages.shape[1]), device=ring.device)
    packed = (at < lens[1])[:, None]
    out = []
    for i, t in enumerate(decode(fmt, pages, g, d, ring.dtype, tables)):
        near = ring[:, i].index_select(2, at % width)
        out.append(torch.where(packed, torch.nn.functional.pad(t, (0, 0, 0, width)), near))
    return out[0], out[1]
