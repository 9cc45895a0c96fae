"""Projection of keys and values onto the leading columns of an orthogonal basis per head (MatryoshkaKV, arXiv:2410.14731)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from effllm.errors import CacheError


@dataclass
class Covariance:
    """Running mean and centred second moment of (tokens, heads, D) vectors per head, fp64."""

    count: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    second: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, x: Tensor) -> None:
        """x (..., heads, tokens, D)."""
        x = x.detach().double().movedim(-3, 0).flatten(1, -2)
        self.count += x.shape[1]
        self.total = self.total + x.sum(1)
        self.second = self.second + x.mT @ x

    @property
    def mean(self) -> Tensor:
        """(heads, D)."""
        return self.total / self.count

    @property
    def centred(self) -> Tensor:
        """(heads, D, D): E[x x^T] - mean mean^T. Raises CacheError (E-KVC-CALIBRATION) where nothing, or nothing finite, was added."""
        if not self.count or not bool(self.second.isfinite().all()):
            raise CacheError("E-KVC-CALIBRATION", f"a covariance of {self.count} vectors, or of some that are not finite", "calibrate on text")
        return self.second / self.count - self.mean[..., :, None] * self.mean[..., None, :]


def pca(covariance: Tensor) -> Tensor:
    """Orthonormal columns by falling variance, (..., D, D) fp64."""
    return torch.linalg.eigh(covariance.double()).eigenvectors.flip(-1)


def project(x: Tensor, u: Tensor, mean: Tensor, rank: int) -> Tensor:
    """(x - mean) U_r: x (..., heads, tokens, D), u (heads, D, D), mean (heads, D) -> (..., heads, tokens, rank)."""
    return (x - mean[:, None].to(x)) @ u[..., :rank].to(x)


def restore(z: Tensor, u: Tensor, mean: Tensor) -> Tensor:
    """mean + z U_r^T, r the last size of z."""
    return z @ u[..., : z.shape[-1]].to(z).mT + mean[:, None].to(z)


def truncate(x: Tensor, u: Tensor, mean: Tensor, ranks: Tensor) -> Tensor:
    """x with every head restored from its own rank, (heads,) integers: differentiable in u."""
    keep = torch.arange(u.shape[-1], device=x.device) < ranks[:, None].to(x.device)
    z = ((x - mean[:, None].to(x)) @ u.to(x)) * keep[:, None].to(x)
    return z @ u.to(x).mT + mean[:, None].to(x)


def fold_value(weight: Tensor, bias: Tensor | None, u: Tensor, mean: Tensor, ranks: list[int]) -> tuple[Tensor, Tensor]:
    """W_v (heads * D, K) that yields projected values, and its bias: rows of head g are U_r^T W_v, (sum of ranks, K); bias U_r^T (b - mean)."""
    heads, d = mean.shape
    w = weight.double().reshape(heads, d, -1)
    b = torch.zeros(heads, d, dtype=torch.float64) if bias is None else bias.double().reshape(heads, d)
    rows = [u[g, :, :r].double().mT @ w[g] for g, r in enumerate(ranks)]
    bias_rows = [u[g, :, :r].double().mT @ (b[g] - mean[g].double()) for g, r in enumerate(ranks)]
    return torch.cat(rows).to(weight), torch.cat(bias_rows).to(weight)


def fold_output(weight: Tensor, bias: Tensor | None, u: Tensor, mean: Tensor, ranks: list[int]) -> tuple[Tensor, Tensor]:
    """W_o (N, query heads * D) for heads of projected values, (N, sum over query heads of ranks), and its bias, to which W_o mean goes.

    Weights of attention add up to one, so the mean comes out of it unchanged.
    """
    kv, d = mean.shape
    n = weight.shape[0]
    w = weight.double().reshape(n, kv, -1, d)  # query heads of a key head are neighbours
    columns = [(w[:, g] @ u[g, :, :r].double()).reshape(n, -1) for g, r in enumerate(ranks)]
    extra = torch.einsum("ngqd,gd->n", w, mean.double())
    return torch.cat(columns, 1).to(weight), (extra if bias is None else bias.double() + extra).to(weight)


def greedy_ranks(
    shape: tuple[int, ...], dim: int, budget: float, change: Callable[[Tensor], Tensor], *, interval: int, floor: int | None = None, share: float = 0.25
) -> Tensor:
    """Ranks per entry (int64 of `shape`: layers, heads, keys or values), lowered where it matters least until their mean is at most budget * dim.

    change(ranks) -> float tensor of `shape`: how much the model's output moves when that one rank alone drops by `interval` from the ranks given.
    Every round lowers the `share` of the entries that still may drop with the least change; ranks never go below `floor` (default `interval`).
    Raises CacheError (E-KVC-RANK) for a budget that the floor does not allow or an interval that does not fit.
    """
    least = interval if floor is None else floor
    if not 0 < interval <= dim or not 0 < least <= dim or dim % interval:
        raise CacheError("E-KVC-RANK", f"interval={interval}, floor={least} for heads of {dim}", "take an interval that divides the head and a floor inside it")
    if not least <= budget * dim <= dim:
        raise CacheError("E-KVC-RANK", f"budget={budget} with a floor of {least} of {dim}", f"a budget from {least / dim:.3g} to 1")
    ranks = torch.full(shape, dim, dtype=torch.int64)
    while float(ranks.double().mean()) > budget * dim + 1e-9:
        cost = change(ranks).double()
        if tuple(cost.shape) != tuple(shape):
            raise CacheError("E-KVC-RANK", f"change() gave {tuple(cost.shape)} for {shape} ranks", "one number per entry")
        flat = torch.where(ranks - interval >= least, cost, torch.inf).flatten()
        order = torch.argsort(flat, stable=True)
        may = int(flat.isfinite().sum())
        need = -(-int(ranks.sum() - int(budget * dim * ranks.numel() + 1e-6)) // interval)  # whole intervals still to go
        count = min(max(1, int(share * ranks.numel())), need, may)
        if count == 0:
            break  # what is left to lower is at its floor
        ranks.view(-1)[order[:count]] -= interval
    return ranks
