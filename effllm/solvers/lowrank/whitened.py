"""Truncation-aware whitening (SVD-LLM, arXiv 2403.07378): the rank-r matrix with the smallest output error on the calibration inputs.

With H = sum x x^T = L L^T and W L = U S V^T the optimum is A = U sqrt(S), B = sqrt(S) V^T L^-1 (first r), and the loss it leaves,
||(W - A B) X||^2, is the sum of the squares of the dropped singular values. With `moments.cross` the aim is the dense model's output,
sum ||W d - A B x||^2, see `metric.target`; with `moments.outputs` errors are measured as ||F^T e||^2, where G = F F^T weighs the
directions of the output by how much the model's loss depends on them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.errors import CalibrationError
from effllm.solvers.lowrank.factors import Factors, balanced, check, truncated
from effllm.solvers.lowrank.metric import DAMP, cholesky, target, unwhiten
from effllm.solvers.moments import Moments

OUTPUT_DAMP = 0.1


def whitened(w: Tensor, rank: int, moments: Moments, *, damp: float = DAMP, output_damp: float = OUTPUT_DAMP) -> Factors:
    """Factors (A, B) of w (N, K)."""
    wide = check(w, rank)
    aim, factor = target(wide, moments, damp)
    left = output_factor(moments.outputs, wide.shape[0], output_damp)
    u, s, v, _ = truncated(aim if left is None else left.t() @ aim, rank)
    a, b = balanced(u, s, v)
    if left is not None:
        a = torch.linalg.solve_triangular(left.t(), a, upper=True)
    return Factors((wide.shape[0], wide.shape[1]), a, unwhiten(b, factor))


def spectrum(w: Tensor, moments: Moments, *, damp: float = DAMP, output_damp: float = OUTPUT_DAMP) -> Tensor:
    """The singular values whose dropped squares are the loss of `whitened`, descending, fp64."""
    wide = check(w, 1)
    aim, _ = target(wide, moments, damp)
    left = output_factor(moments.outputs, wide.shape[0], output_damp)
    return torch.linalg.svdvals(aim if left is None else left.t() @ aim)


def output_factor(outputs: Tensor | None, n: int, damp: float) -> Tensor | None:
    """F (N, N) lower triangular with F F^T = damped G."""
    if outputs is None:
        return None
    if outputs.shape != (n, n):
        raise CalibrationError("E-CAL-HESSIAN", f"output statistics {tuple(outputs.shape)} for {n} outputs", "collect them on this layer's outputs")
    return cholesky(outputs, damp, "output gradient")[0]


def update_a(w: Tensor, factors: Factors, moments: Moments, *, damp: float = DAMP) -> Factors:
    """The closed-form best A given B: A = T H B^T (B H B^T)^-1, for statistics other than those that B was made with."""
    wide = check(w, factors.rank)
    aim, factor = target(wide, moments, damp)
    seen = factors.b.double() @ factor  # B L, so that B H B^T = (B L)(B L)^T
    a = torch.linalg.lstsq(seen.t(), aim.t()).solution.t()
    return Factors(factors.shape, a, factors.b)
