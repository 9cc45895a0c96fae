"""TEAL (arXiv 2408.14690): how much sparsity each projection of a block gets, chosen greedily by the block's output.

All shares start at zero. In every step each projection is tried with a little more, the same number of weights for all of them, and the
one that hurts the block's output least keeps it; harm only grows on the way, so a projection that looked worse before is not tried
again until the others have caught up. Steps go on until the block as a whole reaches the target; the path is a table that
answers for every smaller target too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

TOP = 0.95  # no projection is made sparser than this


@dataclass(frozen=True)
class Step:
    """A point of the path: the block's share of skipped weights, and the share of each projection's inputs."""

    level: float
    shares: dict[str, float]
    error: float


def level(shares: Mapping[str, float], sizes: Mapping[str, int]) -> float:
    """Share of all weights that is skipped."""
    return sum(shares[n] * sizes[n] for n in sizes) / sum(sizes.values())


def greedy(sizes: Mapping[str, int], error: Callable[[Mapping[str, float]], float], target: float, step: float = 0.05) -> list[Step]:
    """The path from dense to `target`. sizes: weights per projection; error: the block's output error at given shares; step: share of
    the smallest projection per step would be too fine for the largest, so it is a share of the mean projection's weights."""
    shares = dict.fromkeys(sizes, 0.0)
    total = sum(sizes.values())
    unit = step * total / len(sizes)
    path = [Step(0.0, dict(shares), 0.0)]
    harm: dict[str, float] = {}  # what one more step of a projection costs, as last measured
    fresh: dict[str, int] = {}  # at which step it was measured
    while path[-1].level < target - 1e-9:
        more = {n: min(unit, (target - path[-1].level) * total) / size for n, size in sizes.items()}
        open_ = [n for n in sizes if shares[n] + more[n] <= TOP]
        if not open_:
            break
        while True:
            name = min(open_, key=lambda n: harm.get(n, -math.inf))
            if fresh.get(name) == len(path):
                break
            value = error(shares | {name: shares[name] + more[name]})
            harm[name], fresh[name] = value - path[-1].error, len(path)
        shares[name] += more[name]
        path.append(Step(level(shares, sizes), dict(shares), path[-1].error + harm[name]))
        del fresh[name]
    return path


def at(path: list[Step], target: float) -> dict[str, float]:
    """Shares for a target on or between the points of a path."""
    for before, after in pairwise(path):
        if before.level <= target <= after.level:
            part = (target - before.level) / (after.level - before.level) if after.level > before.level else 1.0
            return {n: before.shares[n] + part * (after.shares[n] - before.shares[n]) for n in before.shares}
    return dict(path[-1].shares)
