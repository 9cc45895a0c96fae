"""Low rank plus sparse from a dense weight: W ~ A B + S, in the metric of the inputs.

`sltrain`  S unstructured (the form of arXiv 2406.02214). Alternating: given S, A B is `whitened` of W - S; given A B, the support is
           where the residual matters most, |E_ij| sqrt(H_jj) (per layer), and the values are E there.
`lost`     S is whole input channels (the form of LOST): given A B, the channels with the most residual energy; the best values for
           them and the best A are one least-squares problem over concat(B x, x[channels]), and B is `whitened` of what the channels
           leave, with the channels regressed out. Each step lowers the loss or is not taken.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from effllm.errors import WeightError
from effllm.solvers.lowrank.factors import Factors, balanced, check, truncated
from effllm.solvers.lowrank.metric import DAMP, cholesky, unwhiten
from effllm.solvers.moments import Moments

ROUNDS = 6


def sltrain(w: Tensor, rank: int, nonzeros: int, moments: Moments, *, rounds: int = ROUNDS, damp: float = DAMP) -> tuple[Factors, Tensor]:
    """(factors, S (N, K)) of w with at most `nonzeros` entries in S."""
    wide = check(w, rank)
    n, k = wide.shape
    if not 0 <= nonzeros <= n * k:
        raise WeightError("E-WGT-SPARSE", f"{nonzeros} nonzeros for a weight of shape {(n, k)}", f"ask for 0 to {n * k}")
    moments.check(k)
    factor, extra = cholesky(moments.hessian.to(wide.device), damp)
    weight = (moments.hessian.to(wide.device).diagonal().double() + extra).sqrt()
    best: tuple[float, Factors, Tensor] | None = None
    sparse = torch.zeros_like(wide)
    for _ in range(rounds if nonzeros else 1):
        u, s, v, _ = truncated((wide - sparse) @ factor, rank)
        a, b = balanced(u, s, v)
        factors = Factors((n, k), a, unwhiten(b, factor))
        residual = wide - factors.dense()
        if nonzeros:
            flat = (residual.abs() * weight).flatten()
            keep = torch.zeros_like(flat, dtype=torch.bool)
            keep[flat.topk(nonzeros).indices] = True
            sparse = residual * keep.view(n, k)
        left = float(((residual - sparse) @ factor).square().sum())
        if best is None or left < best[0]:
            best = left, factors, sparse
    assert best is not None
    return best[1], best[2]


def lost(w: Tensor, rank: int, channels: int, moments: Moments, *, rounds: int = ROUNDS, damp: float = DAMP) -> Factors:
    """Factors with `channels` whole input channels folded into the second stage: A (N, r + c)."""
    wide = check(w, rank)
    k = wide.shape[1]
    if not 0 < channels < k - rank + 1:
        raise WeightError("E-WGT-SPARSE", f"{channels} channels beside rank {rank} for {k} inputs", f"ask for 1 to {k - rank}")
    moments.check(k)
    factor, extra = cholesky(moments.hessian.to(wide.device), damp)
    h = moments.hessian.to(wide.device).double().clone()
    h.diagonal().add_(extra)
    best: tuple[float, Factors] | None = None
    u, s, v, _ = truncated(wide @ factor, rank)
    b = unwhiten(s[:, None] * v, factor)
    residual = wide - u @ b
    for _ in range(rounds):
        chosen = (residual.square().sum(0) * h.diagonal()).topk(channels).indices.sort().values
        factors = _given_channels(wide, rank, chosen, h, factor)
        left = float(((wide - factors.dense()) @ factor).square().sum())
        if best is not None and left >= best[0] * (1 - 1e-9):
            break
        best = left, factors
        # what the factors alone leave, with the chosen channels' columns counted in again
        residual = wide - factors.a[:, : factors.rank] @ factors.b
    assert best is not None
    return best[1]


def _given_channels(w: Tensor, rank: int, chosen: Tensor, h: Tensor, factor: Tensor) -> Factors:
    """The optimum for a fixed set of channels: they are projected out of the metric, and the rest is an SVD."""
    span = torch.linalg.qr(factor[chosen].t()).Q  # x[channels] in whitened coordinates
    m = w @ factor
    u, s, v, _ = truncated(m - (m @ span) @ span.t(), rank)
    a, b = balanced(u, s, v)
    b = unwhiten(b, factor)
    left = w - a @ b
    # least squares for the channels: (W - A B) H[:, I] H[I, I]^-1
    own = h[chosen][:, chosen]
    values = torch.cholesky_solve((left @ h[:, chosen]).t(), torch.linalg.cholesky(own)).t()
    return replace(Factors((w.shape[0], w.shape[1]), torch.cat([a, values], 1), b), channels=chosen)
