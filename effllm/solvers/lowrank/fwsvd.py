"""Fisher-weighted SVD (arXiv 2207.00112): every output row weighs as much as the loss depends on it.

The element-wise weighted problem has no closed form; with one weight per row, I_i = sum_j E[(dL/dW_ij)^2], it is the SVD of
diag(sqrt I) W, and sum_i I_i ||(W - A B)_i||^2 is the sum of the dropped squares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.errors import CalibrationError
from effllm.solvers.lowrank.factors import Factors, balanced, check, truncated
from effllm.solvers.moments import Moments

FLOOR = 1e-6  # of the mean row weight: rows without a gradient keep a defined solution


def row_weights(fisher: Tensor, shape: tuple[int, int]) -> Tensor:
    """sqrt(I) (N,) fp64 with mean I 1. CalibrationError: E-CAL-FISHER where the gradients are NaN, all zero or of another layer."""
    if tuple(fisher.shape) != shape:
        raise CalibrationError("E-CAL-FISHER", f"squared gradients {tuple(fisher.shape)} for a weight {shape}", "collect them on this layer")
    rows = fisher.double().sum(1)
    mean = float(rows.mean())
    if not torch.isfinite(rows).all() or bool((rows < 0).any()) or not mean > 0:
        raise CalibrationError("E-CAL-FISHER", "the squared gradients are NaN, infinite, negative or all zero", "check the loss and its backward pass")
    return (rows / mean + FLOOR).sqrt()


def fwsvd(w: Tensor, rank: int, moments: Moments) -> Factors:
    """Factors of w (N, K) from `moments.fisher` (N, K)."""
    wide = check(w, rank)
    if moments.fisher is None:
        raise CalibrationError("E-CAL-FISHER", "fwsvd needs squared gradients", "collect them with solvers.lowrank.gradients(weights=True)")
    root = row_weights(moments.fisher.to(wide.device), (wide.shape[0], wide.shape[1]))
    u, s, v, _ = truncated(root[:, None] * wide, rank)
    a, b = balanced(u, s, v)
    return Factors((wide.shape[0], wide.shape[1]), a / root[:, None], b)
