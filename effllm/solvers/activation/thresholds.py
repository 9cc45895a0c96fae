"""Thresholds from histograms: uniform and CATS (one quantile), CHESS (one per channel).

CATS (arXiv 2404.08763): t = quantile of |a|, a the activated gate. CHESS (arXiv 2409.01366): dropping channel i of the gate costs
(a_u,i a_g,i)^2, and |a_u,i| varies over channels but little over inputs, so c_i |a_g,i| with c_i = sqrt(E a_u,i^2) ranks all channels of
a layer in one pool: theta = its quantile, t_i = theta / c_i.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.errors import CalibrationError
from effllm.solvers.activation.histogram import Histogram

SLACK = 0.02  # how far a threshold may miss its share before the activations count as constant


def scalar(seen: Histogram, sparsity: float) -> float:
    """The threshold that drops the share `sparsity` of what was seen; -1, below every magnitude, for 0.

    CalibrationError (E-CAL-CONSTANT) where no threshold does: the activations hardly differ.
    """
    if sparsity == 0:
        return -1.0
    t = seen.quantile(sparsity)
    if not seen.spread() and t > 0:
        raise CalibrationError("E-CAL-CONSTANT", "the activations are constant, no threshold drops a share of them", "calibrate on text that varies")
    return t


def per_channel(scale: Tensor, theta: float) -> Tensor:
    """t_i = theta / c_i as fp32 (N,); infinite where c_i is 0, so that a channel that never counts is always dropped, and -1 where
    theta says that nothing is."""
    if theta < 0:
        return torch.full_like(scale, -1.0, dtype=torch.float32)
    c = scale.double()
    return torch.where(c > 0, theta / c.clamp_min(torch.finfo(torch.float64).tiny), torch.inf).float()


def channel_scale(square: Tensor, count: int) -> Tensor:
    """c_i = sqrt(E a_u,i^2) from sums of squares (N,) over `count` tokens."""
    if count < 1:
        raise CalibrationError("E-CAL-UNSEEN", "no output of the up projection was recorded", "give more calibration data")
    return (square.double() / count).sqrt().float()
