"""The metrics that solvers measure errors in: of the inputs (H = L L^T) and of the outputs (G = F F^T).

Damping adds a share of the mean diagonal, as that many further inputs e_i sqrt(lambda) would, seen alike by the dense and the
compressed model. It makes statistics of fewer tokens than channels positive definite, and keeps the weight where nothing is known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.errors import CalibrationError
from effllm.solvers.moments import Moments

DAMP = 1e-3


def cholesky(h: Tensor, damp: float, what: str = "input") -> tuple[Tensor, float]:
    """Lower triangular L (K, K) fp64 with L L^T = h + lambda I, and lambda = damp * mean diagonal.

    CalibrationError (E-CAL-HESSIAN) where h is not finite, is zero, or is not positive definite at this damping.
    """
    wide = h.double()
    mean = float(wide.diagonal().mean())
    if not mean > 0 or not torch.isfinite(wide).all():
        raise CalibrationError("E-CAL-HESSIAN", f"the {what} statistics are zero or not finite", "calibrate on text that reaches this layer")
    extra = damp * mean
    wide = (wide + wide.t()) / 2
    wide.diagonal().add_(extra)
    factor, info = torch.linalg.cholesky_ex(wide)
    if int(info) != 0 or not torch.isfinite(factor).all():
        cause = f"the {what} statistics are singular at a damping of {damp:g}: fewer tokens than channels?"
        raise CalibrationError("E-CAL-SINGULAR", cause, "give more calibration tokens, or damp more")
    return factor, extra


def target(w: Tensor, moments: Moments, damp: float) -> tuple[Tensor, Tensor]:
    """(T L, L): what a weight Z has to be near in the metric, since the loss is ||(T - Z) L||_F^2 plus a constant.

    Without `cross`, T = W. With it, T = W C H^-1 is the regression of the dense model's outputs on the inputs that the compressed
    model will see; T L = W C L^-T, so that H is never inverted. w (N, K) fp64.
    """
    moments.check(w.shape[1])
    factor, extra = cholesky(moments.hessian.to(w.device), damp)
    if moments.cross is None:
        return w @ factor, factor
    cross = moments.cross.to(w.device).double()
    if not torch.isfinite(cross).all():
        raise CalibrationError("E-CAL-HESSIAN", "the statistics of dense inputs hold NaN or Inf", "check the model's activations on the calibration text")
    cross = cross.clone()
    cross.diagonal().add_(extra)
    return torch.linalg.solve_triangular(factor, (w @ cross).t(), upper=False).t(), factor


def unwhiten(m: Tensor, factor: Tensor) -> Tensor:
    """m L^-1."""
    return torch.linalg.solve_triangular(factor, m, upper=False, left=False)


def loss(w: Tensor, z: Tensor, moments: Moments) -> Tensor:
    """sum ||W d - Z x||^2 up to a constant that does not depend on z (zero without `cross`), fp64, without damping."""
    h = moments.hessian.double()
    w, z = w.double(), z.double()
    if moments.cross is None:
        e = w - z
        return ((e @ h) * e).sum()
    return ((z @ h) * z).sum() - 2 * ((w @ moments.cross.double()) * z).sum()
