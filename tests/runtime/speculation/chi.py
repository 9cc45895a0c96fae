"""Pearson's statistic of counts against expected shares, as a number of standard deviations."""

from __future__ import annotations

import torch
from torch import Tensor

LIMIT = 4.0  # one false alarm in 30,000; seeds are fixed, so there are none from run to run


def deviation(counts: Tensor, share: Tensor) -> float:
    """How unlikely counts are under the shares, in standard deviations of a normal number (Wilson and Hilferty's approximation).

    Cells that expect fewer than 5 are put together; a count where nothing is expected is infinitely unlikely.
    """
    counts, want = counts.double().flatten(), share.double().flatten() * counts.sum()
    if bool((counts[want == 0] > 0).any()):
        return float("inf")
    rare = want < 5
    have = torch.cat([counts[~rare], counts[rare].sum()[None]])
    want = torch.cat([want[~rare], want[rare].sum()[None]])
    have, want = have[want > 0], want[want > 0]
    degrees = len(want) - 1
    assert degrees > 0
    chi = float(((have - want).square() / want).sum())
    spread = 2 / (9 * degrees)
    return ((chi / degrees) ** (1 / 3) - (1 - spread)) / spread**0.5
