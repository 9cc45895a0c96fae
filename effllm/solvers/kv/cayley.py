"""Orthogonal matrices without constraints: the Cayley map and its inverse, batched over leading dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.errors import CacheError


def rotation(x: Tensor) -> Tensor:
    """U = (I - A/2)^-1 (I + A/2) with A = X - X^T, for x (..., D, D): orthogonal with determinant 1, differentiable. X's diagonal has no effect."""
    half = (x - x.mT) / 2
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return torch.linalg.solve(eye - half, eye + half)


def parameters(u: Tensor) -> tuple[Tensor, Tensor]:
    """(X, signs) with rotation(X) = u * signs for orthogonal u (..., D, D): X (..., D, D) strictly lower, signs (..., 1, D) of +-1, in fp64.

    The map has no value where u has an eigenvalue -1, so columns are flipped until I + U is regular; there always are such signs. For a basis
    the sign of a column does not matter. Raises CacheError (E-KVC-BASIS) where u is not orthogonal.
    """
    u = u.double()
    d = u.shape[-1]
    eye = torch.eye(d, dtype=u.dtype, device=u.device)
    if float((u.mT @ u - eye).abs().max()) > 1e-4:
        raise CacheError("E-KVC-BASIS", "the basis is not orthogonal", "take it from pca() or rotation()")
    # Gaussian elimination of I + U S column by column: the pivot of column j is 1 + s_j b_j, whatever the signs before, so the sign of b_j
    # makes every pivot at least 1
    work = u.clone()
    signs = torch.ones(*u.shape[:-2], 1, d, dtype=u.dtype, device=u.device)
    for j in range(d):
        s = torch.where(work[..., j, j] < 0, -1.0, 1.0).to(u)
        signs[..., 0, j] = s
        column = work[..., :, j] * s[..., None]
        pivot = 1 + column[..., j]
        below = column[..., j + 1 :] / pivot[..., None]
        work[..., j + 1 :, :] = work[..., j + 1 :, :] - below[..., None] * work[..., j : j + 1, :]
    flipped = u * signs
    a = 2 * torch.linalg.solve(eye + flipped, flipped - eye)  # both are functions of U, so they commute
    return a.tril(-1), signs
