"""Plain truncated SVD: the rank-r matrix nearest to the weight itself, which says nothing about its outputs."""

from __future__ import annotations

from torch import Tensor

from effllm.solvers.lowrank.factors import Factors, balanced, check, truncated


def svd(w: Tensor, rank: int) -> Factors:
    """A = U sqrt(S), B = sqrt(S) V^T of w (N, K); ||W - A B||_F^2 is the sum of the dropped squares."""
    wide = check(w, rank)
    u, s, v, _ = truncated(wide, rank)
    return Factors((wide.shape[0], wide.shape[1]), *balanced(u, s, v))
