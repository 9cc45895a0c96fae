"""How much the loss feels a relative change of each row and column of each parameter, and the step sizes that follow.

Adam's step on a weight is as long as the learning rate says, however much the loss feels that weight: what a noisy gradient costs is the
curvature times the step squared, so the few weights that the loss feels most limit the learning rate of all. With steps in inverse proportion to the
gradient's size (the diagonal of the natural gradient, where Adam alone has its sign) every weight costs alike. A weight's own gradient is too
noisy to say how large it is; the mean square over its row and its column, as in Adafactor (arXiv 1804.04235), is known after a few batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

SPAN = 8.0  # no row, column or tensor steps by more than this factor more or less than the rest


class Sensitivity:
    """Sums of squared gradients over rows and columns; gradients are in units of the parameters' sizes."""

    def __init__(self) -> None:
        self.rows: dict[str, Tensor] = {}
        self.columns: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, name: str, gradient: Tensor) -> None:
        """One batch's gradient of a parameter."""
        square = gradient.square()
        if gradient.dim() == 2:
            self.columns[name] = self.columns.get(name, torch.zeros((), device=square.device)) + square.mean(0, keepdim=True)
            square = square.mean(1, keepdim=True)
        else:
            square = square.mean()
        self.rows[name] = self.rows.get(name, torch.zeros((), device=square.device)) + square

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By parameter, what its rows (N, 1) and columns (1, K) step more than before, as powers of two, with a geometric mean near 1 over all.

        Tensors of one dimension and of more than two have one factor; those without a gradient so far are left out.
        """
        sizes = {n: math.sqrt(float(r.mean())) for n, r in self.rows.items()}
        known = {n: s for n, s in sizes.items() if s > 0 and math.isfinite(s)}
        shaped = {n: (_shape(self.rows[n]), _shape(self.columns[n]) if n in self.columns else torch.ones(())) for n in known}
        # the mean over weights of what each tensor's row and column factors come to
        logs = {n: math.log(known[n]) - float(r.log().mean()) - float(c.log().mean()) for n, (r, c) in shaped.items()}
        counts = {n: max(1, self.rows[n].numel()) * (self.columns[n].numel() if n in self.columns else 1) for n in known}
        mean = sum(logs[n] * counts[n] for n in known) / max(1, sum(counts.values()))
        found = {}
        for n, (r, c) in shaped.items():
            whole = min(SPAN, max(1 / SPAN, math.exp(mean) / known[n]))
            found[n] = (_power(r * whole), _power(c))
        return found


def merged(kept: Mapping[str, float], found: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Units of parameters: their sizes times the factors."""
    one = torch.ones(())
    return {n: (found[n][0] * s, found[n][1]) if n in found else (torch.tensor(s), one) for n, s in kept.items()}


def _shape(square: Tensor) -> Tensor:
    """The inverse size of rows (or columns) beside each other's, within SPAN."""
    mean = square.mean()
    return (mean / square.clamp_min(float(mean) * 1e-12)).sqrt().clamp(1 / SPAN, SPAN)


def _power(x: Tensor) -> Tensor:
    return torch.exp2(torch.log2(x).round())
