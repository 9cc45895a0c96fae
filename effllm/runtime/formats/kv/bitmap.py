"""Bitmap format of keys and values pruned by magnitude, token by token (Mustafar, arXiv:2505.22913).

Every token of every head keeps exactly `keep_count(D, sparsity)` of its D channels. A page holds 256 tokens and stands alone: because the
count is exact, every page has the same size and starts at `page * size`, so nothing is ever re-packed and no offsets are stored. Pages of
another multiple of 64 tokens work alike.

    keys    tiles of 64 tokens of one channel; bitmap (..., P, 4, D) int64, values (..., P, 256 * keep): block of 64 tokens, channel, token
    values  tiles of 64 channels of one token; bitmap (..., P, 256, ceil(D / 64)) int64, values (..., P, 256 * keep): token, channel

Bit i (value 2^i, so bit 63 is the sign) of a tile is its element i; the kept elements follow in that order. A kept element may be zero.
With `bits` of 4 or 8 the kept elements of a token are sign and level, x = +-(least + level * step), `least` and `step` fp16 per token, level
below 2^(bits-1); of two 4-bit codes in a byte the first is the low one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from effllm.errors import CacheError

PAGE = 256
TILE = 64
BITS = (4, 8, 16)


class Bitmap(NamedTuple):
    """Pages of pruned keys or values; `scale` (..., P, 256, 2) fp16 holds (least, step) per token for quantized values."""

    bitmap: Tensor
    values: Tensor
    scale: Tensor | None


def keep_count(dim: int, sparsity: float) -> int:
    """Channels that a token keeps: D - floor(sparsity * D). Raises CacheError (E-KVC-SPARSITY)."""
    if not 0 <= sparsity < 1:
        raise CacheError("E-KVC-SPARSITY", f"sparsity={sparsity!r}", "sparsity is a number from 0 (keep all) to below 1")
    return dim - math.floor(sparsity * dim + 1e-9)


def keep_mask(x: Tensor, keep: int) -> Tensor:
    """The `keep` entries of largest magnitude along the last axis, exactly; of equal ones the first. NaN counts as infinitely large."""
    size = x.abs()
    size = torch.where(size.isnan(), torch.inf, size)
    least = size.topk(keep, -1).values[..., -1:]
    more, equal = size > least, size == least
    room = keep - more.sum(-1, keepdim=True)
    return more | (equal & (equal.cumsum(-1) <= room))


def prune(x: Tensor, sparsity: float) -> Tensor:
    """x (..., D) with all but the kept entries of every token zero."""
    return torch.where(keep_mask(x, keep_count(x.shape[-1], sparsity)), x, torch.zeros((), dtype=x.dtype, device=x.device))


def words(mask: Tensor) -> Tensor:
    """Bitmaps (..., n) int64 of bool tiles (..., n, 64): element i is bit i."""
    return (mask.long() << torch.arange(TILE, device=mask.device)).sum(-1)


def bits_of(bitmap: Tensor) -> Tensor:
    """Bool tiles (..., 64) of int64 bitmaps; the shift is arithmetic, the mask takes the sign bit as any other."""
    return ((bitmap[..., None] >> torch.arange(TILE, device=bitmap.device)) & 1).bool()


def _key_tiles(x: Tensor, page: int) -> Tensor:
    """(..., P * page, D) -> (..., P, page / 64, D, 64)."""
    return x.unflatten(-2, (-1, page // TILE, TILE)).transpose(-1, -2)


def _value_tiles(x: Tensor, page: int) -> Tensor:
    """(..., P * page, D) -> (..., P, page, ceil(D / 64), 64), missing channels zero."""
    pad = -x.shape[-1] % TILE
    return torch.nn.functional.pad(x, (0, pad)).unflatten(-2, (-1, page)).unflatten(-1, (-1, TILE))


def encode(x: Tensor, sparsity: float, *, keys: bool, bits: int = 16, page: int = PAGE) -> Bitmap:
    """Prune and pack x (..., P * page, D). `bits` 16 keeps the dtype of x. Raises CacheError for part of a page or other bits."""
    if page % TILE or x.shape[-2] % page:
        raise CacheError("E-KVC-PAGE", f"{x.shape[-2]} tokens are no whole number of pages of {page}", f"a page is a multiple of {TILE} tokens")
    if bits not in BITS:
        raise CacheError("E-KVC-BITS", f"bits={bits!r}", f"kept values are stored in {', '.join(map(str, BITS))} bits")
    mask = keep_mask(x, keep := keep_count(x.shape[-1], sparsity))
    payload, scale = (x, None) if bits == 16 else _levels(x, mask, bits)
    tiles = _key_tiles if keys else _value_tiles
    inside = tiles(mask, page)
    kept = tiles(payload, page)[inside].reshape(*x.shape[:-2], x.shape[-2] // page, page * keep)
    return Bitmap(words(inside), nibbles(kept) if bits == 4 else kept, None if scale is None else scale.unflatten(-2, (-1, page)))


def decode(stored: Bitmap, dim: int, *, keys: bool, bits: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    """The pruned tensor (..., P * page, D), zeros filled in. A page that was never written is zero."""
    kept = stored.values if bits != 4 else unnibbles(stored.values)
    inside = bits_of(stored.bitmap)
    flat = inside.flatten(-3)
    place = (flat.cumsum(-1) - 1).clamp_min(0)
    tiles = torch.where(flat, kept.gather(-1, place), torch.zeros((), dtype=kept.dtype, device=kept.device)).unflatten(-1, inside.shape[-3:])
    if keys:
        dense, mask = (t.transpose(-1, -2).flatten(-4, -2) for t in (tiles, inside))
    else:
        dense, mask = (t.flatten(-2)[..., :dim].flatten(-3, -2) for t in (tiles, inside))
    if stored.scale is None:
        return dense.to(dtype)
    least, step = stored.scale.flatten(-3, -2).float().unbind(-1)
    half = 1 << (bits - 1)
    level = (dense & (half - 1)).float()
    value = (least[..., None] + level * step[..., None]) * torch.where(dense >= half, -1.0, 1.0)
    return torch.where(mask, value, 0.0).to(dtype)


def _levels(x: Tensor, mask: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """uint8 codes of x (anything where not kept) and (..., T, 2) fp16 least and step, of which the codes use the rounded ones."""
    size = x.float().abs()
    top = (1 << (bits - 1)) - 1
    least = torch.where(mask, size, torch.inf).amin(-1).half()
    most = torch.where(mask, size, 0.0).amax(-1)
    step = ((most - least.float()) / top).clamp_min(0).half()
    step = torch.where(step == 0, torch.ones((), dtype=torch.half, device=x.device), step)
    level = ((size - least.float()[..., None]) / step.float()[..., None]).round().nan_to_num().clamp(0, top)
    return (level.to(torch.uint8) | (x < 0).to(torch.uint8) << (bits - 1)), torch.stack((least, step), -1)


def nibbles(codes: Tensor) -> Tensor:
    """Two codes below 16 per byte along the last axis (even length), the first in the low half."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def unnibbles(packed: Tensor) -> Tensor:
    """Undoes `nibbles`."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def page_bytes(dim: int, sparsity: float, *, keys: bool, bits: int = 16, page: int = PAGE) -> int:
    """Bytes of one page of one head: bitmaps, kept values, and 4 bytes a token of scales where quantized."""
    keep = keep_count(dim, sparsity)
    maps = 8 * (page // TILE * dim if keys else page * math.ceil(dim / TILE))
    return maps + page * keep * bits // 8 + (0 if bits == 16 else 4 * page)
