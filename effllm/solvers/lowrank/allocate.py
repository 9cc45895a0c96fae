"""Which rank each layer gets, at equal total numbers stored.

Every function returns `Allocation`: per layer a rank, or None for a layer that stays dense with the reason. `ratio` is the share of the
dense numbers of all given layers that is kept, dense layers counted in.

`optimal` is the core: given for every layer what each rank costs and loses, the Lagrangian relaxation (least loss + price * numbers,
the price found by bisection) and then greedy spending of what is left. Curves are either predicted (`energy`, from the squared singular
values that a rank drops) or measured (`sensitivity`, from the KL divergence of the model with one layer compressed).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from effllm.errors import RecipeError
from effllm.solvers.lowrank.factors import break_even, numbers, rank_for

Shape = tuple[int, int]
LRC = 0.4999  # rank reduction above which WeLore calls a layer a low-rank component


@dataclass
class Allocation:
    """Rank per layer (None: dense), why layers stay dense, and the share of numbers that is stored."""

    ranks: dict[str, int | None]
    reasons: dict[str, str] = field(default_factory=dict)
    ratio: float = 1.0
    classes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """One way to store a layer: at a rank (None: dense), with so many numbers, losing so much."""

    rank: int | None
    numbers: int
    loss: float


def stored(shapes: Mapping[str, Shape], ranks: Mapping[str, int | None], *, pivoted: bool) -> float:
    """Share of the dense numbers that ranks store."""
    total = sum(n * k for n, k in shapes.values())
    return sum(_cost(shapes[name], rank, pivoted) for name, rank in ranks.items()) / total


def settle(shapes: Mapping[str, Shape], ranks: Mapping[str, int], *, pivoted: bool) -> Allocation:
    """Ranks at or above break-even become dense."""
    done, reasons = dict[str, int | None](), dict[str, str]()
    for name, rank in ranks.items():
        n, k = shapes[name]
        limit = min(n, k) if pivoted else break_even(n, k)
        done[name] = rank if rank < limit else None
        if rank >= limit:
            reasons[name] = f"rank {rank} is not below the break-even rank {limit} of {(n, k)}"
    return Allocation(done, reasons, stored(shapes, done, pivoted=pivoted))


def uniform(shapes: Mapping[str, Shape], ratio: float, *, pivoted: bool = False) -> Allocation:
    """The same share of numbers in every layer."""
    _ratio(ratio)
    return settle(shapes, {name: rank_for(n, k, ratio, pivoted=pivoted) for name, (n, k) in shapes.items()}, pivoted=pivoted)


def welore(spectra: Mapping[str, Tensor], shapes: Mapping[str, Shape], ratio: float, *, pivoted: bool = False) -> Allocation:
    """WeLore (arXiv 2407.11239): one global threshold on min-max normalized singular values; a layer keeps those above it.

    Layers that lose more than half of their ranks are low-rank components ("LRC") and factorized; the others ("N-LRC") stay dense.
    The threshold is the smallest whose total fits the ratio. RecipeError (E-RCP-RATIO) where none does.
    """
    _ratio(ratio)
    scaled = {name: (s - s.min()) / (s.max() - s.min()).clamp_min(1e-30) for name, s in spectra.items()}

    def at(threshold: float) -> Allocation:
        ranks, classes = dict[str, int | None](), dict[str, str]()
        reasons = {}
        for name, s in scaled.items():
            rank = max(1, int((s >= threshold).sum()))
            low = 1 - rank / len(s) > LRC
            classes[name] = "LRC" if low else "N-LRC"
            cost = numbers(*shapes[name], rank, pivoted=pivoted)
            ranks[name] = rank if low and cost < math.prod(shapes[name]) else None
            if ranks[name] is None:
                reasons[name] = f"N-LRC: keeps {rank} of {len(s)} ranks at threshold {threshold:.4g}" if not low else f"rank {rank} is break-even or above"
        return Allocation(ranks, reasons, stored(shapes, ranks, pivoted=pivoted), classes)

    low, high = 0.0, 1.0
    best = at(high)
    if best.ratio > ratio:
        raise RecipeError("E-RCP-RATIO", f"no threshold stores {ratio:g} or less", f"ask for a ratio of {best.ratio:.3f} or more")
    for _ in range(50):
        middle = (low + high) / 2
        found = at(middle)
        low, high = (low, middle) if found.ratio <= ratio else (middle, high)
        if found.ratio <= ratio:
            best = found
    return best


def energy(
    spectra: Mapping[str, Tensor], shapes: Mapping[str, Shape], ratio: float, *, pivoted: bool = False, step: int = 1, floor: float = 0.0,
    relative: bool = False,
) -> Allocation:  # fmt: skip
    """Least total of the squared singular values that are dropped, over all layers together.

    spectra: per layer the values whose dropped squares are its loss (`whitened.spectrum`; in the metric of the outputs these losses are
    in one unit, nats). `relative` divides each layer's by its own total first, for spectra whose units differ. floor: the smallest
    share of its dense numbers that a layer may have.
    """
    _ratio(ratio)
    curves: dict[str, list[Choice]] = {}
    for name, s in spectra.items():
        n, k = shapes[name]
        square = s.double() ** 2
        tail = (square.sum() - square.cumsum(0)).clamp_min(0) / (square.sum() if relative else 1)
        ranks = sorted({r for r in range(step, min(n, k), step) if numbers(n, k, r, pivoted=pivoted) < n * k} | {1 if floor == 0 else rank_for(n, k, floor)})
        low = floor * n * k * 0.999
        choices = [Choice(r, numbers(n, k, r, pivoted=pivoted), float(tail[r - 1])) for r in ranks]
        curves[name] = [c for c in choices if low <= c.numbers < n * k] + [Choice(None, n * k, 0.0)]
    return optimal(curves, shapes, ratio)


def sensitivity(
    shapes: Mapping[str, Shape], groups: Mapping[str, Sequence[str]], ratios: Sequence[float], measure: Callable[[Mapping[str, int]], float],
    ratio: float, *, pivoted: bool = False,
) -> Allocation:  # fmt: skip
    """Measured: `measure(ranks)` is the KL divergence of the model's logits when only those layers are compressed, to those ranks.

    groups: layers that move together (a block's query, key and value, say). Each is measured at every one of `ratios`.
    """
    _ratio(ratio)
    curves: dict[str, list[Choice]] = {}
    whole: dict[str, Shape] = {}
    for group, members in groups.items():
        size = sum(math.prod(shapes[m]) for m in members)
        whole[group] = (1, size)
        choices = [Choice(None, size, 0.0)]
        for i, share in enumerate(ratios):
            own = {m: rank_for(*shapes[m], share, pivoted=pivoted) for m in members}
            cost = sum(numbers(*shapes[m], r, pivoted=pivoted) for m, r in own.items())
            if cost < size:
                choices.append(Choice(i, cost, max(0.0, measure(own))))
        curves[group] = choices
    found = optimal(curves, whole, ratio)
    ranks: dict[str, int | None] = {}
    reasons: dict[str, str] = {}
    for group, members in groups.items():
        index = found.ranks[group]
        for m in members:
            ranks[m] = None if index is None else rank_for(*shapes[m], ratios[index], pivoted=pivoted)
            if index is None:
                reasons[m] = f"group {group} loses most per number saved"
    return Allocation(ranks, reasons, stored(shapes, ranks, pivoted=pivoted))


def optimal(curves: Mapping[str, Sequence[Choice]], shapes: Mapping[str, Shape], ratio: float) -> Allocation:
    """One choice per layer with the least total loss among those that store at most `ratio`."""
    total = sum(math.prod(s) for s in shapes.values())
    budget = ratio * total * (1 + 1e-12)
    table = {name: sorted(choices, key=lambda c: (c.numbers, c.loss)) for name, choices in curves.items()}
    cheapest = sum(choices[0].numbers for choices in table.values())
    if cheapest > budget:
        raise RecipeError("E-RCP-RATIO", f"no choice of ranks stores {ratio:g} or less", f"ask for a ratio of {cheapest / total:.3f} or more")

    def at(price: float) -> dict[str, Choice]:
        return {name: min(choices, key=lambda c: (c.loss + price * c.numbers, c.numbers)) for name, choices in table.items()}

    low, high = 0.0, max((c.loss for choices in table.values() for c in choices), default=1.0) + 1e-300
    best = {name: choices[0] for name, choices in table.items()}
    for _ in range(100):
        middle = math.sqrt(low * high) if low else high / 16
        found = at(middle)
        if sum(c.numbers for c in found.values()) <= budget:
            best, high = found, middle
        else:
            low = middle
        if low and high / low < 1 + 1e-9:
            break
    _spend(best, table, budget)
    ranks = {name: c.rank for name, c in best.items()}
    reasons = {name: "its ranks lose more than they save" for name, rank in ranks.items() if rank is None}
    return Allocation(ranks, reasons, sum(c.numbers for c in best.values()) / total)


def _spend(best: dict[str, Choice], table: Mapping[str, Sequence[Choice]], budget: float) -> None:
    """Upgrade single layers, best gain per number first, while the budget lasts."""
    left = budget - sum(c.numbers for c in best.values())
    while True:
        top: tuple[float, str, Choice] | None = None
        for name, now in best.items():
            for c in table[name]:
                more, gain = c.numbers - now.numbers, now.loss - c.loss
                if 0 < more <= left and gain > 0 and (top is None or gain / more > top[0]):
                    top = (gain / more, name, c)
        if top is None:
            return
        left -= top[2].numbers - best[top[1]].numbers
        best[top[1]] = top[2]


def _cost(shape: Shape, rank: int | None, pivoted: bool) -> int:
    return math.prod(shape) if rank is None else numbers(*shape, rank, pivoted=pivoted)


def _ratio(ratio: float) -> None:
    if not 0 < ratio <= 1:
        raise RecipeError("E-RCP-RATIO", f"ratio {ratio:g}", "ask for a share of the dense numbers above 0 and up to 1")


def summary(allocation: Allocation, shapes: Mapping[str, Shape]) -> dict[str, float]:
    """Per kind of layer (last part of the name) the mean rank over the full one."""
    shares: dict[str, list[float]] = {}
    for name, rank in allocation.ranks.items():
        shares.setdefault(name.rpartition(".")[2], []).append(1.0 if rank is None else rank / min(shapes[name]))
    return {kind: float(torch.tensor(v).mean()) for kind, v in shares.items()}
