"""How a model's target is shared out over its blocks.

Where a share s of block i is dropped, the model's output moves by about a_i exp(b s): the least sum at a given total has the same slope in all blocks,
s_i = m + log(w_i / a_i) / b, w_i the block's weights. a_i is what one block alone costs at the target.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

GROWTH = 8.0  # b; KL of the demo model grows by 6.5 to 9 per unit of sparsity between 0.4 and 0.7, with all methods
SPAN = 0.2  # no block leaves the target by more: costs are measured there, and exponentials do not hold everywhere
_LEAST = 1e-6  # of the largest cost


def shares(costs: Mapping[str, float], sizes: Mapping[str, int], target: float, *, growth: float = GROWTH, span: float = SPAN) -> dict[str, float]:
    """A share per block, `target` on average over `sizes` (weights); costs: what each block costs alone, at the target, in any unit.

    Blocks of equal cost per weight get the target. Shares stay within `span` of it, and within 0 and 1.
    """
    top = max(costs.values(), default=0.0)
    if top <= 0 or target <= 0:
        return dict.fromkeys(costs, target)
    least, most = max(0.0, target - span), min((1 + target) / 2, target + span)
    want = {n: math.log(sizes[n] / max(c, _LEAST * top)) / growth for n, c in costs.items()}
    total = sum(sizes[n] for n in costs)

    def at(m: float) -> dict[str, float]:
        return {n: min(most, max(least, m + w)) for n, w in want.items()}

    low, high = least - max(want.values()), most - min(want.values())
    for _ in range(60):
        middle = (low + high) / 2
        if sum(sizes[n] * s for n, s in at(middle).items()) > target * total:
            high = middle
        else:
            low = middle
    return at((low + high) / 2)
