"""Low-rank plus sparse parts of a weight by greedy bilateral smoothing (GreBsmo), which DSEE (arXiv 2111.00160) uses to place its sparse update.

    W ~ U V + S:   U = orthonormal basis of (W - S) V^T,  V = U^T (W - S),  S = soft(W - U V, threshold)

The rank grows by a few columns at a time: new rows of V are the leading right singular directions of what is left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.errors import WeightError


def grebsmo(w: Tensor, rank: int, *, threshold: float = 0.01, grow: int = 2, rounds: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """(U (N, rank), V (rank, K), S (N, K)) of w (N, K), fp32. `threshold` is relative to the largest weight.

    Deterministic: the search directions start from the columns of w. Raises WeightError (E-WGT-RANK) for a rank that does not fit.
    """
    n, k = w.shape
    if not 0 < rank <= min(n, k):
        raise WeightError("E-WGT-RANK", f"rank {rank} of a {n} x {k} weight", f"give a rank of 1 to {min(n, k)}")
    w = w.detach().float()
    level = threshold * float(w.abs().max())
    s = torch.zeros_like(w)
    v = w.new_zeros(0, k)
    u = w.new_zeros(n, 0)
    while v.shape[0] < rank:
        left = w - s - u @ v
        v = torch.cat([v, _leading(left, min(grow, rank - v.shape[0]))])
        for _ in range(rounds):
            d = w - s
            u, _ = torch.linalg.qr(d @ v.t())
            v = u.t() @ d
            s = _soft(w - u @ v, level)
    return u, v, s


def support(s: Tensor, count: int) -> Tensor:
    """Sorted flat indices (count,) int64 of the entries of largest magnitude."""
    if not 0 < count <= s.numel():
        raise WeightError("E-WGT-SPARSE", f"{count} sparse entries of {s.numel()} weights", f"give 1 to {s.numel()}")
    return s.flatten().abs().topk(count).indices.sort().values


def _leading(left: Tensor, count: int) -> Tensor:
    """Rows (count, K) near the leading right singular vectors: two power iterations from the largest columns of `left`'s Gram image."""
    start = left[left.norm(dim=1).topk(min(count, left.shape[0])).indices]
    q = torch.linalg.qr(start.t())[0]
    for _ in range(2):
        q = torch.linalg.qr(left.t() @ (left @ q))[0]
    return q.t()


def _soft(x: Tensor, level: float) -> Tensor:
    return x.sign() * (x.abs() - level).clamp_min(0)
