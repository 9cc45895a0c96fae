"""Atomic feature mimicking (feature-based low rank, KDD 2024): principal components of the outputs, around their mean.

y ~ U U^T (y - mu) + mu with U the top eigenvectors of Cov(y) is `whitened` on centred inputs plus a bias: A B minimizes
E||(W - A B)(x - mean x)||^2, and the shift (W - A B) mean x keeps the mean output exactly. The expected error is the sum of the dropped
eigenvalues, never more than that of `whitened`. With `cross` and `dense_total` the same around both means.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from effllm.errors import CalibrationError
from effllm.solvers.lowrank.factors import Factors, check
from effllm.solvers.lowrank.metric import DAMP
from effllm.solvers.lowrank.whitened import whitened
from effllm.solvers.moments import Moments


def centred(moments: Moments) -> Moments:
    """The moments around the means. CalibrationError (E-CAL-SHORT) for fewer than two inputs."""
    if moments.count < 2:
        raise CalibrationError("E-CAL-SHORT", f"{moments.count} inputs have no covariance", "give more calibration text")
    total = moments.total.double()
    hessian = moments.hessian.double() - torch.outer(total, total) / moments.count
    cross = moments.cross
    if cross is not None:
        dense = moments.dense_total
        if dense is None:
            raise CalibrationError("E-CAL-HESSIAN", "statistics of dense inputs without their sum", "collect them with calibrated(targets=True)")
        cross = cross.double() - torch.outer(dense.double(), total) / moments.count
    return replace(moments, hessian=hessian, cross=cross, total=torch.zeros_like(total))


def afm(w: Tensor, rank: int, moments: Moments, *, damp: float = DAMP) -> Factors:
    """Factors of w (N, K) and the shift (N,) that is to be added to the bias."""
    wide = check(w, rank)
    moments.check(wide.shape[1])
    factors = whitened(wide, rank, centred(moments), damp=damp)
    return with_shift(wide, factors, moments)


def with_shift(w: Tensor, factors: Factors, moments: Moments) -> Factors:
    """The factors with the shift that makes their mean output that of the dense layer."""
    count = max(1, moments.count)
    mean = moments.total.to(w.device).double() / count
    dense = mean if moments.cross is None or moments.dense_total is None else moments.dense_total.to(w.device).double() / count
    return replace(factors, shift=w.double() @ dense - factors.dense() @ mean)
