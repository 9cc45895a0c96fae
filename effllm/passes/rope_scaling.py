"""Names the scaling of rotary frequencies from their values.

Plain frequencies are theta^(-c / C), c = 0 .. C - 1. Linear scaling divides all of them by a factor. llama3 and YaRN leave the fast
ones, divide the slow ones, and blend between: llama3 in proportion to the frequency, YaRN in proportion to c. LongRoPE has a factor
per channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

VARIES = "longrope"  # found by other frequencies at another length
_CLOSE = 1e-4  # relative: frequencies are stored in fp32, and theta is taken from two of them


def classify(omega: Tensor, factor: float) -> str:
    """ "default", "linear", "llama3", "yarn" or "per-channel" for frequencies (C,) in fp64."""
    if omega.numel() < 4 or not bool((omega > 0).all()):
        return "per-channel" if omega.numel() >= 4 else "default"
    log = omega.log()
    step = (log[-1] - log[0]) / (len(omega) - 1)
    if _near(log, log[0] + step * torch.arange(len(omega))):
        return "default" if abs(float(omega[0]) - 1) < _CLOSE else "linear"
    # fast channels are unscaled: theta from the first two, checked by the first frequency being 1
    plain = torch.arange(len(omega)) * (log[1] - log[0])
    share = (log - plain).exp()  # of the plain frequency: 1 for fast channels, 1 / factor for slow ones
    low = float(share[-1])
    if abs(float(omega[0]) - 1) > _CLOSE or not 0 < low < 1 - _CLOSE or bool((share.diff() > _CLOSE).any()):
        return "per-channel"
    blend = (share - low) / (1 - low)
    middle = (blend > 1e-3) & (blend < 1 - 1e-3)
    if int(middle.sum()) < 3:
        return "yarn" if abs(factor - 1) > 1e-6 else "llama3"
    at = torch.arange(len(omega), dtype=torch.float64)[middle]
    error = {"yarn": _line(at, blend[middle]), "llama3": _line(plain[middle].exp(), blend[middle])}
    best = min(error, key=lambda name: error[name])
    return best if error[best] < 1e-2 else "per-channel"


def _near(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() < _CLOSE)


def _line(x: Tensor, y: Tensor) -> float:
    """Largest distance of y from its line over x."""
    basis = torch.stack((torch.ones_like(x), x), 1)
    return float((basis @ torch.linalg.lstsq(basis, y[:, None]).solution - y[:, None]).abs().max())
