"""Reorder channels so that an N:M mask keeps more: groups of M neighbours that hold N large scores each.

The idea of channel permutations for N:M sparsity (Pool and Yu, NeurIPS 2021): swap channels between groups as long as the kept score grows, and
leave a local optimum by a bounded number of random disturbances. Here the gains of all swaps come from one formula. With group A less its channel
i, b = the sum of the N largest scores of a row and t = the N-th largest, channel j in the place of i keeps sum over rows of b + max(0, s_j - t).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from effllm.coupling.dimension import Structure
from effllm.errors import CouplingError

_SMALL = 1 << 18  # scores up to this many are searched in fp64


class Improved(NamedTuple):
    """A permutation of shape `structure.shape`, and the shares of the total score that an N:M mask keeps without and with it."""

    permutation: Tensor
    gain: float
    before: float
    after: float
    swaps: int
    stopped: str  # "settled": nothing left to try; "budget": out of time, so another machine may find another order


def kept(scores: Tensor, n: int, m: int) -> float:
    """The sum over the N largest scores of every M neighbours of a row; scores (rows, K)."""
    grouped = scores.reshape(scores.shape[0], -1, m)
    return float(grouped.topk(n, dim=-1).values.sum(dtype=torch.float64))


def improve_nm(
    scores: Sequence[Tensor], n: int, m: int, structure: Structure, *, budget_s: float = 30.0, seed: int = 0, escapes: int = 8, sample: int = 2048
) -> Improved:
    """The legal permutation of a dimension that an N:M mask keeps most of, as far as the search finds it; never worse than no permutation.

    scores: of each consumer (rows, channels), channels = blocks x size of the structure, block by block, not negative, higher is kept. Blocks are
    searched one by one. The search looks at `sample` rows drawn by seed, and its result is judged on all of them. Same seed, same permutation,
    unless the budget ended it. Raises CouplingError for bad scores, patterns or sizes.
    """
    _checked(scores, n, m, structure)
    size, blocks = structure.size, scores[0].shape[1] // structure.size
    generator = torch.Generator().manual_seed(seed)
    deadline = time.monotonic() + budget_s
    orders, swaps, late = [], 0, False
    before = after = total = 0.0
    for block in range(blocks):
        rows = torch.cat([s[:, block * size : (block + 1) * size].detach().float() for s in scores])
        start, order, found = kept(rows, n, m), torch.arange(size), 0
        if n < m < size:
            share = deadline - (deadline - time.monotonic()) * (1 - 1 / (blocks - block))
            order, found, over = _search(_sampled(rows, sample, generator), n, m, share, generator, escapes)
            late |= over
        end = kept(rows[:, order], n, m)
        if end <= start:
            order, end, found = torch.arange(size), start, 0
        orders.append(order)
        swaps += found
        before, after, total = before + start, after + end, total + float(rows.sum(dtype=torch.float64))
    scale = total or 1.0
    permutation = torch.stack(orders).reshape(structure.shape)
    return Improved(permutation, (after - before) / scale, before / scale, after / scale, swaps, "budget" if late else "settled")


def _checked(scores: Sequence[Tensor], n: int, m: int, structure: Structure) -> None:
    if not (isinstance(n, int) and isinstance(m, int) and 0 < n <= m):
        raise CouplingError("E-CPL-PATTERN", f"{n}:{m} is no N:M pattern", "N of every M are kept, 0 < N <= M")
    if structure.size % m:
        raise CouplingError("E-CPL-PATTERN", f"groups of {m} do not fill {structure.size} channels", "choose an M that divides the dimension's size")
    if not scores:
        raise CouplingError("E-CPL-SCORE", "no scores", "give one (rows, channels) tensor per consumer")
    channels = structure.size
    for blocks in structure.blocks:
        channels *= blocks
    for i, s in enumerate(scores):
        if s.dim() != 2 or s.shape[1] != channels:
            raise CouplingError("E-CPL-SCORE", f"scores {i} have shape {tuple(s.shape)}", f"they are (rows, {channels})")
        if not bool(torch.isfinite(s).all()) or bool((s < 0).any()):
            raise CouplingError("E-CPL-SCORE", f"scores {i} have negative or non-finite values", "scores are such as |w| or |w| times the input's norm")


def _sampled(rows: Tensor, sample: int, generator: torch.Generator) -> Tensor:
    return rows if len(rows) <= sample else rows[torch.randperm(len(rows), generator=generator)[:sample]]


def _search(rows: Tensor, n: int, m: int, deadline: float, generator: torch.Generator, escapes: int) -> tuple[Tensor, int, bool]:
    """Swaps until none helps, then disturb the best order and try again, at most `escapes` times. Returns the order, the swaps, whether time ran out."""
    best, swaps, late = _descend(rows, torch.arange(rows.shape[1]), n, m, deadline)
    value = kept(rows[:, best], n, m)
    for _ in range(escapes):
        if late:
            break
        order, more, late = _descend(rows, _disturbed(best, m, generator), n, m, deadline)
        if (reached := kept(rows[:, order], n, m)) > value:
            best, value, swaps = order, reached, swaps + more
    return best, swaps, late


def _disturbed(order: Tensor, m: int, generator: torch.Generator) -> Tensor:
    """An order with the channels of a few groups dealt anew: an eighth of the groups, at least two."""
    groups = order.reshape(-1, m).clone()
    count = max(2, len(groups) // 8)
    chosen = torch.randperm(len(groups), generator=generator)[:count]
    pool = groups[chosen].reshape(-1)
    groups[chosen] = pool[torch.randperm(len(pool), generator=generator)].reshape(-1, m)
    return groups.reshape(-1)


def _descend(rows: Tensor, order: Tensor, n: int, m: int, deadline: float) -> tuple[Tensor, int, bool]:
    """Apply the best swaps until none helps. Swaps between different groups do not touch each other, so each round takes many of them."""
    rows = rows.double() if rows.numel() <= _SMALL else rows
    order, swaps = order.clone(), 0
    table = _Table(rows[:, order], n, m)
    while True:
        pairs, value = table.swaps(), float(table.group.sum())
        if not len(pairs):
            return order, swaps, False
        a, b = pairs.T
        swapped = order.clone()
        swapped[a], swapped[b] = order[b], order[a]
        table.update(rows[:, swapped], torch.unique(pairs // m))
        if float(table.group.sum()) <= value:  # gains that were rounding
            return order, swaps, False
        order, swaps = swapped, swaps + len(pairs)
        if time.monotonic() > deadline:
            return order, swaps, True


class _Table:
    """value[i, j]: the score that i's group keeps with channel j in the place of i; both are places in the present order."""

    def __init__(self, columns: Tensor, n: int, m: int) -> None:
        self.n, self.m = n, m
        size = columns.shape[1]
        self.value = torch.zeros(size, size, dtype=torch.float64)
        self.group = torch.zeros(size // m, dtype=torch.float64)
        self.base = torch.zeros(size, dtype=torch.float64)
        self.threshold = torch.zeros_like(columns)
        self.floor = 0.0
        self.update(columns, torch.arange(size // m))

    def update(self, columns: Tensor, groups: Tensor) -> None:
        """Take in that the channels of some groups changed: their rows and their columns of the table."""
        n, m, count = self.n, self.m, len(columns)
        if 2 * len(groups) * m > columns.shape[1]:  # rows and columns of the table would overlap more than they save
            groups = torch.arange(columns.shape[1] // m)
        grouped = columns.reshape(count, -1, m)[:, groups]
        self.group[groups] = grouped.topk(n, dim=-1).values.sum((0, 2), dtype=torch.float64)
        for slot in range(m):
            rest = grouped[:, :, [k for k in range(m) if k != slot]]
            top = rest.topk(min(n, m - 1), dim=-1).values
            places = groups * m + slot
            self.threshold[:, places] = top[..., -1]
            self.base[places] = top.sum((0, 2), dtype=torch.float64)
        places = (groups[:, None] * m + torch.arange(m)).reshape(-1)
        self.value[places] = _excess(columns, self.threshold[:, places]).T + self.base[places, None]
        if len(groups) < columns.shape[1] // m:
            self.value[:, places] = _excess(columns[:, places], self.threshold).T + self.base[:, None]
        self.floor = 1e-7 * float(self.group.sum())  # fp32 scores: less is rounding

    def swaps(self) -> Tensor:
        """Pairs of places (swaps, 2) that help, best first, no group twice."""
        now = self.group.repeat_interleave(self.m)
        gain = self.value + self.value.T - now[:, None] - now[None, :]
        own = torch.arange(len(now)) // self.m
        gain[own[:, None] >= own[None, :]] = 0.0
        best, partner = gain.max(1)
        order = torch.argsort(best, descending=True, stable=True)
        used: set[int] = set()
        found: list[tuple[int, int]] = []
        for i in order.tolist():
            if best[i] <= self.floor:
                break
            j = int(partner[i])
            a, b = i // self.m, j // self.m
            if a not in used and b not in used:
                used |= {a, b}
                found.append((i, j))
        return torch.tensor(found, dtype=torch.int64).reshape(-1, 2)


def _excess(columns: Tensor, thresholds: Tensor) -> Tensor:
    """sum over rows of max(0, s_j - t_i), (columns, thresholds), as half of |s_j - t_i| + s_j - t_i: an L1 distance has no temporaries."""
    distance = torch.cdist(columns.T.contiguous(), thresholds.T.contiguous(), p=1).double()
    return (distance + columns.sum(0, dtype=torch.float64)[:, None] - thresholds.sum(0, dtype=torch.float64)[None, :]) / 2
