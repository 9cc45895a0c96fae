"""Histograms of magnitudes, streamed: 128 bins per power of two from 2^-20 to 2^12, 4096 in all.

The bin of a number is read off its fp32 bits (exponent and seven leading bits of the mantissa), so a pass costs one shift and one
bincount. Smaller magnitudes, zero among them, share the first bin, whose lower edge is zero; larger ones share the last. A bin is at
most 0.8 % wide, and quantiles are interpolated within it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from effllm.errors import CalibrationError

BINS = 4096
_PER_OCTAVE, _LOWEST = 128, -20
_SHIFT = 16  # leaves sign, exponent and seven bits
_OFFSET = (127 + _LOWEST) * _PER_OCTAVE


def edges() -> Tensor:
    """Upper edges (BINS,) fp64; the first bin begins at zero."""
    bits = (torch.arange(1, BINS + 1, dtype=torch.int64) + _OFFSET) << _SHIFT
    return bits.to(torch.int32).view(torch.float32).double()


@dataclass
class Histogram:
    """Counts (BINS,) int64 of magnitudes, and the number of exact zeros among them."""

    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.int64))
    zeros: int = 0

    def add(self, x: Tensor) -> None:
        """Count |x| of a tensor of any shape. CalibrationError (E-CAL-NAN) for NaN or infinite values."""
        index = (x.detach().reshape(-1).float().contiguous().view(torch.int32) & 0x7FFFFFFF) >> _SHIFT
        if index.numel() == 0:
            return
        least, most = (int(i) for i in torch.aminmax(index))
        if most >= 255 * _PER_OCTAVE:
            raise CalibrationError("E-CAL-NAN", "activations are NaN or infinite on the calibration data", "calibrate in fp32 or bf16, or check the weights")
        if least == 0:  # zero, or below 2^-126
            self.zeros += int((index == 0).sum())
        self.counts += torch.bincount((index - _OFFSET).clamp_(0, BINS - 1), minlength=BINS).cpu()

    @property
    def total(self) -> int:
        """Numbers counted."""
        return int(self.counts.sum())

    def quantile(self, share: float) -> float:
        """The t with P(|x| <= t) = share; 0 where exact zeros alone make up the share."""
        total = self.total
        if total == 0:
            raise CalibrationError("E-CAL-UNSEEN", "no activation was recorded", "give more calibration data")
        want = share * total
        if want <= self.zeros:
            return 0.0
        below = torch.cumsum(self.counts, 0)
        at = int(torch.searchsorted(below, torch.tensor(math.ceil(want))))
        lower, upper = _edge(at - 1), _edge(at)
        before = int(below[at - 1]) if at else self.zeros
        return lower + (upper - lower) * (want - before) / max(1, int(below[at]) - before)

    def share(self, t: float) -> float:
        """P(|x| <= t), the sparsity that a threshold brings."""
        if t == math.inf:
            return 1.0
        below = torch.cumsum(self.counts, 0)
        at = int(torch.searchsorted(edges(), torch.tensor(t, dtype=torch.float64)))
        if at >= BINS:
            return 1.0
        before = int(below[at - 1]) if at else self.zeros
        inside = (int(below[at]) - before) * (t - _edge(at - 1)) / (_edge(at) - _edge(at - 1))
        return (before + inside) / max(1, self.total)

    def spread(self) -> bool:
        """Whether the non-zero numbers fill more than two neighbouring bins: a threshold can only split what differs."""
        filled = self.counts.nonzero()[:, 0]
        return filled.numel() > 2 or (filled.numel() == 2 and int(filled[1] - filled[0]) > 1)


def _edge(bin: int) -> float:
    return 0.0 if bin < 0 else float(edges()[bin])
