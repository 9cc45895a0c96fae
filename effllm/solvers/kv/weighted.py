"""Bases that lose little of what attention computes, not of the vectors themselves: principal axes of keys as queries see them.

Dropping columns r.. of an orthogonal U leaves the error P x with P = I - U_r U_r^T. What it costs is (q . P k)^2 for keys and |W_o P v|^2 for
values, on average tr(W P C P) with C the covariance of what is projected and W the second moment of queries, or W_o^T W_o. Principal axes are
the special case W = I. There is no closed form for a nested basis, so U is found by descent on its Cayley parameters from the principal axes on;
nothing is run through the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effllm.errors import CacheError
from effllm.solvers.kv.basis import pca
from effllm.solvers.kv.cayley import parameters, rotation


def lost(u: Tensor, covariance: Tensor, weight: Tensor, ranks: Sequence[int]) -> Tensor:
    """tr(W P_r C P_r) / tr(W C) for every rank: u, covariance, weight (..., D, D) -> (..., len(ranks))."""
    whole = (weight * covariance.mT).sum((-2, -1)).clamp_min(torch.finfo(u.dtype).tiny)
    seen, given = u.mT @ weight @ u, u.mT @ covariance @ u  # both in the basis, where P keeps the last columns
    both = seen * given.mT
    return torch.stack([both[..., r:, r:].sum((-2, -1)) / whole for r in ranks], -1)


def weighted_basis(covariance: Tensor, weight: Tensor, ranks: Sequence[int], *, steps: int = 300, rate: float = 0.02) -> Tensor:
    """Orthonormal columns (..., D, D) fp64 for which the geometric mean of `lost` over `ranks` is at most that of the principal axes.

    Raises CacheError (E-KVC-RANK) for ranks outside 1 to D - 1, (E-KVC-CALIBRATION) for statistics that are not finite.
    """
    d = covariance.shape[-1]
    if not ranks or not all(0 < r < d for r in ranks):
        raise CacheError("E-KVC-RANK", f"ranks {list(ranks)} for heads of {d}", f"give ranks from 1 to {d - 1}")
    if not bool(covariance.isfinite().all() and weight.isfinite().all()):
        raise CacheError("E-KVC-CALIBRATION", "statistics that are not finite", "look at the text and the model")
    with torch.inference_mode(False), torch.enable_grad():
        c, w = covariance.detach().double().clone(), weight.detach().double().clone()
        start = pca(c)
        x, signs = parameters(start)
        best, least = start * signs, _measure(start, c, w, ranks)
        free = x.clone().requires_grad_()
        optimizer = torch.optim.Adam([free], rate)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - step / steps)
            u = rotation(free)
            each = _measure(u, c, w, ranks)
            better = each.detach() < least
            best = torch.where(better[..., None, None], u.detach(), best)
            least = torch.where(better, each.detach(), least)
            optimizer.zero_grad()
            each.sum().backward()
            optimizer.step()
    return best


def _measure(u: Tensor, covariance: Tensor, weight: Tensor, ranks: Sequence[int]) -> Tensor:
    return lost(u, covariance, weight, ranks).clamp_min(1e-12).log().sum(-1)  # logarithms, so that every rank counts alike
