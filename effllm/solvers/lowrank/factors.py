"""A weight as factors, what its numbers cost, and what every low-rank solver checks first.

    plain      W = A B                    A (N, r), B (r, K): r (N + K) numbers; pays below r = N K / (N + K), the break-even rank
    pivoted    W[pivots] = B, W[others] = A B     A (N - r, r), B (r, K): r (N + K - r) numbers, fewer than N K at every rank r < min(N, K)
    channels   W = A[:, :r] B, and W[:, channels] += A[:, r:]     A (N, r + c)

The pivoted form is the same matrix as the plain one: a rank-r matrix is r of its rows and how the others combine from them, which takes
the r^2 numbers of freedom (A M, M^-1 B) out of the storage (the idea of arXiv 2501.19090).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from effllm.errors import WeightError


@dataclass
class Factors:
    """Numbers of a low-rank weight of `shape` (N, K). `shift` (N,) is to be added to the linear's bias."""

    shape: tuple[int, int]
    a: Tensor
    b: Tensor
    shift: Tensor | None = None
    channels: Tensor | None = None
    pivots: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rows of B."""
        return self.b.shape[0]

    @property
    def numbers(self) -> int:
        """Numbers stored in the factors."""
        return self.a.numel() + self.b.numel()

    def dense(self) -> Tensor:
        """The (N, K) matrix that the factors mean."""
        if self.pivots is not None:
            w = self.b.new_empty(self.shape)
            w[self.pivots] = self.b
            w[others(self.pivots, self.shape[0])] = self.a @ self.b
            return w
        w = self.a[:, : self.rank] @ self.b
        if self.channels is not None:
            w[:, self.channels] += self.a[:, self.rank :]
        return w


def others(pivots: Tensor, n: int) -> Tensor:
    """The rows of 0..n-1 that are no pivots, in order."""
    free = torch.ones(n, dtype=torch.bool, device=pivots.device)
    free[pivots.long()] = False
    return free.nonzero()[:, 0]


def break_even(n: int, k: int) -> int:
    """The smallest rank at which A B in plain form stores at least as many numbers as the dense weight."""
    return -(-n * k // (n + k))


def numbers(n: int, k: int, rank: int, *, pivoted: bool) -> int:
    """Numbers stored at a rank."""
    return rank * (n + k - rank) if pivoted else rank * (n + k)


def rank_for(n: int, k: int, ratio: float, *, pivoted: bool = False) -> int:
    """The largest rank whose factors hold at most `ratio` of the dense numbers, at least 1 and at most min(N, K)."""
    budget = ratio * n * k * (1 + 1e-12)
    if not pivoted:
        return max(1, min(n, k, int(budget / (n + k))))
    root = (n + k) ** 2 - 4 * budget
    return max(1, min(n, k, min(n, k) if root <= 0 else math.floor((n + k - math.sqrt(root)) / 2 + 1e-9)))


def check(w: Tensor, rank: int) -> Tensor:
    """The weight in fp64. WeightError: E-WGT-RANK for a rank that (N, K) cannot have, E-WGT-NAN, E-WGT-DIM."""
    if w.dim() != 2 or 0 in w.shape:
        raise WeightError("E-WGT-DIM", f"the weight has shape {tuple(w.shape)}, not (out, in)", "exclude the module with a dense rule")
    full = min(w.shape)
    if not 1 <= rank <= full:
        raise WeightError("E-WGT-RANK", f"rank {rank} for a weight of shape {tuple(w.shape)}", f"ask for a rank from 1 to {full}, or a ratio")
    wide = w.detach().double()
    if not torch.isfinite(wide).all():
        raise WeightError("E-WGT-NAN", f"{int((~torch.isfinite(wide)).sum())} of {w.numel()} weights are NaN or infinite", "repair the checkpoint")
    return wide


def truncated(m: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U (N, r), sigma (r,), V^T (r, K) of the best rank-r approximation of m, and all singular values."""
    u, s, v = torch.linalg.svd(m, full_matrices=False)
    return u[:, :rank], s[:rank], v[:rank], s


def balanced(u: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A = U sqrt(sigma) and B = sqrt(sigma) V^T: factors of equal norms, which quantize best."""
    root = s.sqrt()
    return u * root, root[:, None] * v
