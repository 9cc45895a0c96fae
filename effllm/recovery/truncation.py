"""Trained rank pruning (TRP, arXiv 1910.04576): a nuclear-norm subgradient at every step, a truncated SVD every `period` steps.

On factors the weight W = a b is never formed: with a = Qa Ra and b^T = Qb Rb its singular vectors are those of the small Ra Rb^T,
rotated by Qa and Qb.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effllm.errors import OptionError


@dataclass(frozen=True)
class Truncation:
    """period: steps between two truncations; energy: share of the squared singular values to keep; nuclear: weight of the nuclear norm."""

    period: int = 20
    energy: float = 0.9
    nuclear: float = 3e-4

    def __post_init__(self) -> None:
        if self.period < 1 or not 0 < self.energy <= 1 or not self.nuclear >= 0:
            cause = f"period={self.period}, energy={self.energy}, nuclear={self.nuclear}"
            raise OptionError("E-OPT-TRUNCATION", cause, "give a period of at least 1, an energy in (0, 1] and a nuclear weight of at least 0")


def rank_of(sigma: Tensor, energy: float) -> int:
    """The smallest rank whose squared singular values (descending) are at least `energy` of all; at least 1."""
    squares = sigma.double().square()
    total = squares.sum()
    if total == 0:
        return 1
    # a share of 1 keeps all that is not zero; the sum's own rounding must not ask for more than there is
    reached = torch.cumsum(squares, 0) >= energy * total * (1 - 1e-12)
    return int(reached.int().argmax()) + 1


def decompose(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (N, q), sigma (q,) descending and V^T (q, K) of a @ b with a (N, r), b (r, K), in fp64; q = min(N, r, K)."""
    qa, ra = torch.linalg.qr(a.double())
    qb, rb = torch.linalg.qr(b.double().t())
    u, sigma, vh = torch.linalg.svd(ra @ rb.t(), full_matrices=False)
    return qa @ u, sigma, vh @ qb.t()


def truncate(a: Tensor, b: Tensor, energy: float) -> tuple[Tensor, Tensor, int]:
    """Factors of the truncated SVD of a @ b, with the singular values split evenly, in a's and b's shapes (zeros behind the rank); and the rank."""
    u, sigma, vh = decompose(a, b)
    rank = rank_of(sigma, energy)
    root = sigma[:rank].sqrt()
    left, right = torch.zeros_like(a), torch.zeros_like(b)
    left[:, :rank] = (u[:, :rank] * root).to(a.dtype)
    right[:rank] = (root[:, None] * vh[:rank]).to(b.dtype)
    return left, right, rank


def truncate_dense(w: Tensor, energy: float) -> tuple[Tensor, int]:
    """The truncated SVD of w (N, K), and its rank."""
    u, sigma, vh = torch.linalg.svd(w.double(), full_matrices=False)
    rank = rank_of(sigma, energy)
    return ((u[:, :rank] * sigma[:rank]) @ vh[:rank]).to(w.dtype), rank


def nuclear_gradient(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Subgradient of the nuclear norm of a @ b with respect to a and b: (U V^T) b^T and a^T (U V^T)."""
    u, sigma, vh = decompose(a, b)
    kept = sigma > sigma[:1] * 1e-9  # directions that are not in the product have no singular vectors
    u, vh = u[:, kept], vh[kept]
    return (u @ (vh @ b.double().t())).to(a.dtype), ((a.double().t() @ u) @ vh).to(b.dtype)


def nuclear_gradient_dense(w: Tensor) -> Tensor:
    """Subgradient U V^T of the nuclear norm of w (N, K)."""
    u, sigma, vh = torch.linalg.svd(w.double(), full_matrices=False)
    kept = sigma > sigma[:1] * 1e-9
    return (u[:, kept] @ vh[kept]).to(w.dtype)
