"""What calibration knows of one layer: moments of its inputs, and gradients where a solver needs them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effllm.errors import CalibrationError


@dataclass
class Moments:
    """Sums over `count` calibration inputs x (K,) of a layer with a weight (N, K), in fp32 or wider; no mean is taken off.

    hessian (K, K) = sum x x^T; total (K,) = sum x; magnitude (K,) = sum |x|. `cross` (K, K) = sum d x^T, with d the input that the same
    layer has in the dense model: there where x comes from a compressed prefix, so that a solver can aim at the dense output.
    dense_total (K,) = sum d, beside it. fisher (N, K) = mean squared gradient of the loss per weight, for Fisher-weighted solvers;
    outputs (N, N) = mean g g^T of the gradients g at the layer's outputs, for those that weigh directions of the output.
    """

    hessian: Tensor
    total: Tensor
    magnitude: Tensor
    count: int
    cross: Tensor | None = None
    fisher: Tensor | None = None
    dense_total: Tensor | None = None
    outputs: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """Mean input (K,)."""
        return self.total / max(1, self.count)

    def check(self, k: int) -> None:
        """Raise CalibrationError (E-CAL-HESSIAN) where the moments do not belong to a layer with K inputs or are not finite."""
        wrong = self.hessian.shape != (k, k) or self.total.shape != (k,) or (self.cross is not None and self.cross.shape != (k, k))
        if wrong:
            cause = f"the statistics have shape {tuple(self.hessian.shape)}, not {(k, k)}"
            raise CalibrationError("E-CAL-HESSIAN", cause, "collect them on this layer's inputs")
        if not all(torch.isfinite(t).all() for t in (self.hessian, self.total)):
            raise CalibrationError("E-CAL-HESSIAN", "the statistics hold NaN or Inf", "check the model's activations on the calibration text")


def of_inputs(x: Tensor, dense: Tensor | None = None) -> Moments:
    """Moments of inputs x (tokens, K); `dense` (tokens, K) are the same tokens' inputs in the dense model."""
    x = x.double() if x.dtype == torch.float64 else x.float()
    moments = Moments(x.t() @ x, x.sum(0), x.abs().sum(0), x.shape[0])
    if dense is not None:
        dense = dense.to(x.dtype)
        moments.cross, moments.dense_total = dense.t() @ x, dense.sum(0)
    return moments
