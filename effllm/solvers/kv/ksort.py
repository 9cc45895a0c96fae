"""Order of key channels so that those of similar size share a block (K-sort, arXiv:2403.20137).

q . k is what it was when the channels of both are reordered alike, but rotary embeddings turn pairs of channels (i, i + D/2), so there are
three ways that stay exact:

    pair      pairs move as one, frequencies with them, at compile time: `pair_order`, a permutation of the coupled rotary dimension
    post      any order, applied to q and k after the rotation: `channel_order`, a gather when keys are written and queries read
    layout    pairs become neighbours (i, i + D/2 -> 2j, 2j + 1) and are sorted as pairs: `layout_order`, also after the rotation

With blocks as large as the head no order helps; with blocks of D/2 `pair` does not help either, since each half stays a block of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.errors import CacheError

WAYS = ("none", "pair", "post", "layout")


def head_energy(weight: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Squared norm of every row of W_k (heads * D, K), its bias counted in: (heads, D) fp64."""
    rows = weight.double().square().sum(1) + (0 if bias is None else bias.double().square())
    return rows.reshape(heads, -1)


def pair_energy(energy: Tensor, rotary: int | None = None) -> Tensor:
    """Energy of the pairs (i, i + R/2), which a rotation leaves as it is: (..., D) -> (..., R/2). `rotary` R channels take part, default all."""
    r = energy.shape[-1] if rotary is None else rotary
    if r % 2 or not 0 < r <= energy.shape[-1]:
        raise CacheError("E-KVC-ROTARY", f"{rotary} rotary channels in a head of {energy.shape[-1]}", "an even number, at most the head's channels")
    return energy[..., : r // 2] + energy[..., r // 2 : r]


def pair_order(energy: Tensor, rotary: int | None = None) -> Tensor:
    """Way "pair": the permutation (..., R/2) that sorts pairs by falling energy. With one table of angles it must be the same in all heads: sum first."""
    return torch.argsort(pair_energy(energy, rotary), dim=-1, descending=True, stable=True)


def pairs_to_channels(order: Tensor, dim: int) -> Tensor:
    """The permutation of all channels that moves pairs (..., R/2): new channel i is old channel p[i], channels beyond R stay."""
    r = 2 * order.shape[-1]
    rest = torch.arange(r, dim).expand(*order.shape[:-1], dim - r)
    return torch.cat((order, order + r // 2, rest), -1)


def channel_order(energy: Tensor, rotary: int | None = None) -> Tensor:
    """Way "post": channels by falling energy (..., D); those without rotation stay behind the `rotary` ones."""
    r = energy.shape[-1] if rotary is None else rotary
    parts = [torch.argsort(part, dim=-1, descending=True, stable=True) for part in (energy[..., :r], energy[..., r:])]
    return torch.cat((parts[0], parts[1] + r), -1)


def layout_order(energy: Tensor, rotary: int | None = None) -> Tensor:
    """Way "layout": pairs by falling energy, the two channels of a pair next to each other (..., D)."""
    r = energy.shape[-1] if rotary is None else rotary
    pairs = pair_order(energy, r)
    beside = torch.stack((pairs, pairs + r // 2), -1).flatten(-2)
    return torch.cat((beside, torch.arange(r, energy.shape[-1]).expand(*energy.shape[:-1], energy.shape[-1] - r)), -1)


def reorder(x: Tensor, order: Tensor) -> Tensor:
    """x (B, H, T, D) with the channels of head h in the order of its key head: order (G, D), H a multiple of G."""
    per_head = order.repeat_interleave(x.shape[1] // order.shape[0], 0)
    return torch.gather(x, -1, per_head[None, :, None].expand(x.shape[0], -1, x.shape[2], -1).to(x.device))


def permute_rows(weight: Tensor, order: Tensor, heads: int) -> Tensor:
    """W_q or W_k (heads * D, ...) with the rows of every head in the order of its key head: order (G, D). For biases too."""
    rows = weight.reshape(heads, -1, *weight.shape[1:])
    per_head = order.repeat_interleave(heads // order.shape[0], 0).to(weight.device)
    return torch.stack([rows[h][per_head[h]] for h in range(heads)]).reshape(weight.shape)
