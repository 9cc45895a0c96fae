"""Activation-aware SVD (arXiv 2312.05821): input channels are scaled by how large their activations are, s_j = (mean |x_j|)^alpha.

Diagonal only: with alpha = 1 and s = sqrt(H_jj) it is `whitened` for a diagonal H.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.errors import CalibrationError
from effllm.solvers.lowrank.factors import Factors, balanced, check, truncated
from effllm.solvers.moments import Moments

ALPHA = 0.5
FLOOR = 1e-6


def scales(moments: Moments, k: int, alpha: float) -> Tensor:
    """s (K,) fp64, with mean 1 before the floor so that no activation scale is too small for it."""
    moments.check(k)
    mean = moments.magnitude.double() / max(1, moments.count)
    if not torch.isfinite(mean).all() or not float(mean.mean()) > 0:
        raise CalibrationError("E-CAL-HESSIAN", "the activations' magnitudes are zero or not finite", "calibrate on text that reaches this layer")
    return (mean / mean.mean() + FLOOR) ** alpha


def asvd(w: Tensor, rank: int, moments: Moments, *, alpha: float = ALPHA) -> Factors:
    """Factors of w (N, K): SVD of W diag(s), with diag(1/s) put back into B."""
    wide = check(w, rank)
    s = scales(moments, wide.shape[1], alpha).to(wide.device)
    u, sigma, v, _ = truncated(wide * s, rank)
    a, b = balanced(u, sigma, v)
    return Factors((wide.shape[0], wide.shape[1]), a, b / s)
