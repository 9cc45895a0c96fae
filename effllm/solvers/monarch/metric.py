"""The metric of calibration: errors E of a weight cost tr(E H E^T), H the damped second moment of the inputs.

With `cross` C = sum d x^T, d the dense model's input and x the one this layer really gets, the cost of M is sum |W d - M x|^2, which is
tr((A - M) H (A - M)^T) plus a constant for A = W C H^-1: aiming at A in the metric H is aiming at the dense output. Damping counts as
further inputs d = x, so it pulls A to W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effllm.errors import CalibrationError
from effllm.solvers.gptq import damped
from effllm.solvers.moments import Moments

DAMP = 1e-3  # of the mean diagonal


@dataclass(frozen=True)
class Metric:
    """h (K, K) fp64 positive definite with mean diagonal about one; `cross` (K, K) in the same units, or None."""

    h: Tensor
    cross: Tensor | None = None

    @staticmethod
    def of(moments: Moments, k: int, damp: float = DAMP) -> Metric:
        """From sums over inputs. Raises CalibrationError (E-CAL-HESSIAN) where they do not fit, are not finite, or are singular undamped."""
        moments.check(k)
        h = damped(moments.hessian, k, damp)
        cross = None
        mean = float(moments.hessian.double().diagonal().mean())
        if moments.cross is not None and mean > 0:
            if not torch.isfinite(moments.cross).all():
                raise CalibrationError("E-CAL-HESSIAN", "the statistics hold NaN or Inf", "check the model's activations on the calibration text")
            cross = moments.cross.double() / mean
            cross.diagonal().add_(damp)
        factor(h)
        return Metric(h, cross)

    def to(self, device: torch.device | str) -> Metric:
        """The same on another device."""
        return Metric(self.h.to(device), None if self.cross is None else self.cross.to(device))

    def aim(self, w: Tensor) -> Tensor:
        """What to approximate for w (N, K) fp64: w itself, or w C H^-1."""
        return w if self.cross is None else torch.cholesky_solve((w @ self.cross).t(), factor(self.h)).t()

    def padded(self, k: int) -> Tensor:
        """h for K padded to `k` columns, which meet no input: unit weight and no coupling, so that they stay zero."""
        have = self.h.shape[0]
        h = torch.eye(k, dtype=self.h.dtype, device=self.h.device)
        h[:have, :have] = self.h
        return h

    def loss(self, error: Tensor) -> float:
        """tr(E H E^T) of error E (N, K)."""
        return float(((error @ self.h) * error).sum())


def factor(h: Tensor) -> Tensor:
    """The Cholesky factor (lower) of h (..., K, K). Raises CalibrationError (E-CAL-HESSIAN) where h is not positive definite."""
    lower, info = torch.linalg.cholesky_ex(h)
    if bool((info != 0).any()):
        cause = "the statistics are singular: fewer tokens than channels, or channels that repeat each other"
        raise CalibrationError("E-CAL-HESSIAN", cause, "calibrate on more tokens, or use damping")
    return lower
