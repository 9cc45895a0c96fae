"""What the trials so far say about the rest of a space: where the cost model errs, and which trials are worth most.

The logarithm of measured over predicted time is taken as a Gaussian process: one error shared by all configurations, one for each value
of each field (a cost model is mostly wrong about kinds of configurations), and one of a configuration's own. Their sizes are those of
a small grid under which the trials so far are likeliest. The next trials are those of the largest expected improvement; within a round
each is chosen as if those before it had come out as expected, which spreads them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from effllm.lowering.op import Config

_SHARED = 1.0  # variance of the error that all configurations share: a machine's constants may be far off
_NOISE = 1e-4  # variance of a measurement: about 1 %
_SIZES = tuple((s, own * s) for s in (0.05, 0.1, 0.2, 0.3) for own in (0.5, 1.0))  # standard deviations: per value, own


class Learned:
    """Errors of the predictions of a list of configurations, `predicted` in seconds; trials are named by their place in it."""

    def __init__(self, configs: Sequence[Config], predicted: Sequence[float]) -> None:
        fields = sorted({f for c in configs for f in c})
        self._log = torch.tensor(predicted, dtype=torch.float64).log()
        codes = torch.full((len(configs), max(1, len(fields))), -1, dtype=torch.long)  # -1: a field that the configuration lacks
        for j, f in enumerate(fields):
            numbers = {v: i for i, v in enumerate(dict.fromkeys(c[f] for c in configs if f in c))}
            codes[:, j] = torch.tensor([numbers[c[f]] if f in c else -1 for c in configs])
        self._codes = codes
        self._present = (codes >= 0).sum(-1).double()

    def expected(self, seconds: Mapping[int, float]) -> list[float]:
        """The time expected of every configuration (its median), given those measured."""
        if not seconds:
            return [float(x) for x in self._log.exp()]
        at, y = list(seconds), [math.log(s) for s in seconds.values()]
        found: list[float] = self._posterior(at, y, self._sizes(at, y))[0].exp().tolist()
        return found

    def next(self, seconds: Mapping[int, float], without: set[int], count: int) -> list[tuple[int, float]]:
        """Up to `count` configurations not in `without` with their expected improvement on the best time, as a share of it."""
        open_ = torch.ones(len(self._log), dtype=torch.bool)
        open_[[*without, *seconds]] = False
        if not seconds:  # nothing is known: the cheapest by prediction
            ranked = [int(i) for i in torch.argsort(self._log, stable=True) if open_[i]]
            return [(i, 1.0) for i in ranked[:count]]
        at, y = list(seconds), [math.log(s) for s in seconds.values()]
        sizes = self._sizes(at, y)
        found: list[tuple[int, float]] = []
        while len(found) < count and bool(open_.any()):
            mean, variance = self._posterior(at, y, sizes)
            deviation = variance.sqrt()
            z = (min(y) - mean) / deviation
            gain = deviation * (z * torch.special.ndtr(z) + torch.exp(-z * z / 2) / math.sqrt(2 * math.pi))
            gain[~open_] = -1.0
            i = int(gain.argmax())
            found.append((i, float(gain[i])))
            open_[i] = False
            at.append(i)
            y.append(float(mean[i]))
        return found

    def _sizes(self, at: list[int], y: list[float]) -> tuple[float, float]:
        """The sizes of the errors under which the trials are likeliest."""
        rest = torch.tensor(y, dtype=torch.float64) - self._log[at]
        shared = self._shared(at)[:, at]
        best, likeliest = _SIZES[0], -math.inf
        for s, own in _SIZES:
            factor = torch.linalg.cholesky(self._covariance(shared, s, own))
            scaled = torch.linalg.solve_triangular(factor, rest[:, None], upper=False)
            likelihood = -0.5 * float((scaled * scaled).sum()) - float(factor.diagonal().log().sum())
            if likelihood > likeliest:
                best, likeliest = (s, own), likelihood
        return best

    def _posterior(self, at: list[int], y: list[float], sizes: tuple[float, float]) -> tuple[Tensor, Tensor]:
        """Mean and variance of the logarithm of every configuration's time."""
        s, own = sizes
        rest = torch.tensor(y, dtype=torch.float64) - self._log[at]
        shared = self._shared(at)
        across = shared * (s * s) + _SHARED
        factor = torch.linalg.cholesky(self._covariance(shared[:, at], s, own))
        mean = self._log + (across.T @ torch.cholesky_solve(rest[:, None], factor))[:, 0]
        explained = torch.linalg.solve_triangular(factor, across, upper=False)
        variance = self._present * (s * s) + _SHARED + own * own - (explained * explained).sum(0)
        return mean, variance.clamp_min(1e-12)

    def _shared(self, at: list[int]) -> Tensor:
        """Fields in which each of `at` has the value that each configuration has: (len(at), configurations)."""
        codes = self._codes
        return torch.stack([((codes == codes[i]) & (codes >= 0)).sum(-1) for i in at]).double()

    def _covariance(self, shared: Tensor, s: float, own: float) -> Tensor:
        return shared * (s * s) + _SHARED + torch.eye(len(shared), dtype=torch.float64) * (own * own + _NOISE)
