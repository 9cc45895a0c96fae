"""Shares per projection from what each costs the model's output, not its block's.

What a projection costs at a share s is its cost alone at the target, times how the cost of its kind (all query projections at once, say) grows with s.
The least sum of costs at a given number of skipped weights has the same cost per further weight everywhere.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

TOP = 0.95  # no projection is made sparser than this
_STEP = 0.01  # of a share
_POWER = 3.0  # below the first measured level: the dropped squares of numbers whose density near 0 is even
_LEAST = 1e-6  # of the largest cost


def growth(levels: Sequence[float], costs: Sequence[float], target: float) -> list[float]:
    """How the cost grows over shares 0, 0.01, ..., 0.95, as a multiple of that at `target`: exponential between the levels that were measured."""
    least = _LEAST * max(max(costs), 1e-30)
    logs = [math.log(max(c, least)) for c in costs]

    def log_cost(s: float) -> float:
        if s <= levels[0]:
            return logs[0] + _POWER * math.log(max(s, 1e-9) / levels[0])
        i = min(bisect_right(levels, s), len(levels) - 1)
        (a, b), (x, y) = levels[i - 1 : i + 1], logs[i - 1 : i + 1]
        return x + (y - x) * (s - a) / (b - a)

    at = log_cost(target)
    return [math.exp(log_cost(k * _STEP) - at) if k else 0.0 for k in range(round(TOP / _STEP) + 1)]


def shares(costs: Mapping[str, float], curves: Mapping[str, Sequence[float]], sizes: Mapping[str, int], target: float) -> dict[str, float]:
    """A share per projection, `target` on average over `sizes` (weights), or 0.95 everywhere where the target is above.

    costs: of each projection alone at the target; curves: its growth, as `growth` gives it.
    """
    top = max(costs.values(), default=0.0)
    if top <= 0 or target <= 0:
        return dict.fromkeys(costs, target)
    # what the step that ends at a share costs per weight: never less than the one before, so that steps are taken in order
    prices = {}
    for n, cost in costs.items():
        scale = max(cost, _LEAST * top) / sizes[n]
        prices[n] = list(accumulate((scale * (b - a) for a, b in pairwise(curves[n])), max))
    wanted, total = target * sum(sizes[n] for n in costs), 0.0
    found = dict.fromkeys(costs, 0.0)
    for _, n in sorted((price, n) for n, steps in prices.items() for price in steps):
        step = min(_STEP, (wanted - total) / sizes[n])
        found[n], total = found[n] + step, total + step * sizes[n]
        if step < _STEP:
            break
    return found
