"""When a chain is long enough (SpecDec++, arXiv:2405.19715): once some drafted token is likely enough to be rejected.

With estimates a_i of the probability that token i is accepted given that those before it are, drafting goes on while
1 - a_1 a_2 .. a_k <= threshold, within bounds. Any rule that depends on the draft alone leaves the output exact; one that looks at the
target's answer would not.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Stopping:
    """threshold in [0, 1]: 0 stops as soon as allowed, 1 never; least, most: bounds on drafted tokens. `survival` is a_1 .. a_k so far."""

    threshold: float
    least: int
    most: int
    survival: float = 1.0

    def saw(self, estimate: float) -> None:
        """An estimate for the next token of the chain."""
        self.survival *= min(1.0, max(0.0, estimate))

    def go_on(self, drafted: int) -> bool:
        """Whether to draft another after `drafted` tokens."""
        if drafted >= self.most:
            return False
        return drafted < self.least or 1.0 - self.survival <= self.threshold
