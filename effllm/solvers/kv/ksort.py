"""Order of key channels so that an outlier coarsens few others (K-sort, arXiv:2403.20137).

q . k is what it was when the channels of both are reordered alike, but rotary embeddings turn pairs of channels (i, i + D/2), so there are
three ways that stay exact:

    pair      pairs move as one, frequencies with them, at compile time: `pair_order`, a permutation of the coupled rotary dimension
    post      any order, applied to q and k after the rotation: `channel_order`, a gather when keys are written and queries read
    layout    pairs become neighbours (i, i + D/2 -> 2j, 2j + 1) and are sorted as pairs: `layout_order`, also after the rotation

With blocks as large as the head no order helps; with blocks of D/2 `pair` does not help either, since each half stays a block of its own.

Sorting by the size of keys alone lowers the error of the keys and may raise that of the scores: channels with large keys are often the ones that
queries read most, and sorting gives all of them the coarsest step (on SmolLM2-135M at 4 bits in blocks of 32, 6 % less error in keys and 41 % more
in scores). So each order takes `weight` as well, the energy of the queries; what is made small then is `cost`.
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


def cost(energy: Tensor, order: Tensor, weight: Tensor, block: int) -> Tensor:
    """What blocks of `block` channels in an order do to scores, up to a factor: sum over blocks of largest energy times summed weight; (..., D) -> (...)."""
    e, w = (t.expand(order.shape).gather(-1, order).unflatten(-1, (-1, block)) for t in (energy, weight))
    return (e.amax(-1) * w.sum(-1)).sum(-1)


def block_order(energy: Tensor, weight: Tensor, block: int) -> Tensor:
    """An order (..., D) of low `cost`: channels are split in two groups of whole blocks, as well as that can be done, and each group again.

    Given the largest energy m of the lower group, the best lower group are the channels of most weight among those of at most m; every m is tried.
    Raises CacheError (E-KVC-GROUP) where blocks do not divide D.
    """
    d = energy.shape[-1]
    if block < 1 or d % block:
        raise CacheError("E-KVC-GROUP", f"blocks of {block} do not divide {d} channels", "take a block that does")
    flat = [t.double().expand(energy.shape).reshape(-1, d) for t in (energy, weight)]
    return torch.stack([_halve(e, w, block) for e, w in zip(*flat, strict=True)]).reshape(energy.shape)


def _halve(e: Tensor, w: Tensor, block: int) -> Tensor:
    d = e.numel()
    size = d // block // 2 * block  # of the lower group
    if size == 0:
        return torch.arange(d, device=e.device)
    rising, best, least = e.argsort(stable=True), torch.zeros(d, dtype=torch.bool), torch.inf
    for n in range(size, d + 1):
        may = rising[:n]
        low = torch.zeros(d, dtype=torch.bool)
        low[may[w[may].argsort(descending=True, stable=True)[:size]]] = True
        now = float(e[low].max() * w[low].sum() + e[~low].max() * w[~low].sum())
        if now < least:
            best, least = low, now
    groups = [g.nonzero()[:, 0] for g in (~best, best)]  # the coarse one first
    return torch.cat([g[_halve(e[g], w[g], block)] for g in groups])


def pair_order(energy: Tensor, rotary: int | None = None, weight: Tensor | None = None) -> Tensor:
    """Way "pair": the permutation (..., R/2) that sorts pairs by falling energy, over weight where there is one. With one table of angles it must be the
    same in all heads: sum first."""
    score = pair_energy(energy, rotary)
    if weight is not None:
        score = score / pair_energy(weight, rotary).clamp_min(torch.finfo(weight.dtype).tiny)
    return torch.argsort(score, dim=-1, descending=True, stable=True)


def pairs_to_channels(order: Tensor, dim: int) -> Tensor:
    """The permutation of all channels that moves pairs (..., R/2): new channel i is old channel p[i], channels beyond R stay."""
    r = 2 * order.shape[-1]
    rest = torch.arange(r, dim).expand(*order.shape[:-1], dim - r)
    return torch.cat((order, order + r // 2, rest), -1)


def channel_order(energy: Tensor, rotary: int | None = None, weight: Tensor | None = None, block: int = 32) -> Tensor:
    """Way "post": channels (..., D) by falling energy, or by `block_order` where there are weights; those without rotation stay behind the `rotary` ones."""
    r = energy.shape[-1] if rotary is None else rotary
    parts = []
    for at, part in ((0, slice(0, r)), (r, slice(r, None))):
        parts.append(_sorted(energy[..., part], None if weight is None else weight[..., part], block) + at)
    return torch.cat(parts, -1)


def layout_order(energy: Tensor, rotary: int | None = None, weight: Tensor | None = None, block: int = 32) -> Tensor:
    """Way "layout": the two channels of a pair next to each other (..., D), pairs by falling energy or by `block_order`."""
    d = energy.shape[-1]
    r = d if rotary is None else rotary
    if weight is None:
        pairs = pair_order(energy, r)
    else:
        pair_energy(energy, r)  # refuses what is no number of rotary channels
        pairs = _sorted(torch.maximum(energy[..., : r // 2], energy[..., r // 2 : r]), pair_energy(weight, r), max(1, block // 2))
    beside = torch.stack((pairs, pairs + r // 2), -1).flatten(-2)
    return torch.cat((beside, torch.arange(r, d).expand(*energy.shape[:-1], d - r)), -1)


def _sorted(energy: Tensor, weight: Tensor | None, block: int) -> Tensor:
    if weight is None or not energy.shape[-1] or energy.shape[-1] % block:
        return torch.argsort(energy, dim=-1, descending=True, stable=True)
    return block_order(energy, weight, block)


def reorder(x: Tensor, order: Tensor) -> Tensor:
    """x (B, H, T, D) with the channels of head h in the order of its key head: order (G, D), H a multiple of G."""
    per_head = order.repeat_interleave(x.shape[1] // order.shape[0], 0)
    return torch.gather(x, -1, per_head[None, :, None].expand(x.shape[0], -1, x.shape[2], -1).to(x.device))


def permute_rows(weight: Tensor, order: Tensor, heads: int) -> Tensor:
    """W_q or W_k (heads * D, ...) with the rows of every head in the order of its key head: order (G, D). For biases too."""
    rows = weight.reshape(heads, -1, *weight.shape[1:])
    per_head = order.repeat_interleave(heads // order.shape[0], 0).to(weight.device)
    return torch.stack([rows[h][per_head[h]] for h in range(heads)]).reshape(weight.shape)
