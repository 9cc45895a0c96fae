"""Improve codes and scales in the Hessian metric: alternate a closed-form scale refit and coordinate descent over codes.

With E = W - Q the loss of an output row is E H E^T, and rows are independent.

Scales.  Given codes, Q is linear in the row's scales (and minima): Q = sum_p theta_p b_p, one basis vector b_p per group and
parameter that is zero outside its group. The step delta solves the normal equations (B H B^T) delta = B H E^T, a G x G (affine:
2G x 2G) system per row.

Codes.  Given scales, moving one weight by d changes the loss by d^2 H_jj - 2 d (E H)_j; the best grid point is the one nearest to
q_j + (E H)_j / H_jj. One sweep visits all columns; E H is kept up to date in blocks.

Both lower the loss in exact arithmetic; rounding of scales to their stored dtype may not, so a row keeps its old numbers
wherever the new ones are no better.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from effllm.runtime.formats import bipolar

_BLOCK = 64
_BUDGET = 1 << 21  # elements of the largest temporary of the refit: larger ones fall out of the cache
_RIDGE = 1e-6  # relative; keeps groups with equal codes solvable


@dataclass
class Coded:
    """Codes (K, N) fp32 on a grid: columns first, so that one column of all rows is contiguous.

    scale and minimum are (G, N) in the stored dtype; value = 2 * scale * u + low, low = minimum or -2 * scale * zero.
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor | None
    bits: int
    group: int
    grid: str

    @staticmethod
    def of(codes: Tensor, scale: Tensor, minimum: Tensor | None, bits: int, group: int, grid: str) -> Coded:
        """From row-first codes (N, K), scale and minimum (N, G)."""
        low = None if minimum is None else minimum.t().contiguous()
        return Coded(codes.t().float().contiguous(), scale.t().contiguous(), low, bits, group, grid)

    def __post_init__(self) -> None:
        self.width = self.group or self.codes.shape[0]
        self.zero = bipolar.zero_point(self.bits, self.grid)
        self.step = 2 * self.scale.float()
        self.low = -self.step * self.zero if self.minimum is None else self.minimum.float()
        self.inverse = torch.where(self.step > 0, 1 / self.step, torch.zeros_like(self.step))

    def with_codes(self, codes: Tensor) -> Coded:
        """The same grid with other codes."""
        return replace(self, codes=codes)

    def nearest(self, x: Tensor, g: int) -> tuple[Tensor, Tensor]:
        """Codes and values nearest to one column x (N,) of group g."""
        u = ((x - self.low[g]) * self.inverse[g]).round_().clamp_(0, 2**self.bits - 1)
        return u, u * self.step[g] + self.low[g]

    def values(self) -> Tensor:
        """Dense values (K, N) fp32."""
        k = self.codes.shape[0]
        step, low = (t.repeat_interleave(self.width, 0)[:k] for t in (self.step, self.low))
        return self.codes * step + low


def row_loss(w: Tensor, h: Tensor, q: Tensor) -> Tensor:
    """E H E^T per row (N,) fp64 for w and q (K, N) and H (K, K) fp32."""
    e = w - q
    return (e * (h @ e)).sum(0, dtype=torch.float64)


def refine(w: Tensor, h: Tensor, start: Coded, rounds: int) -> Coded:
    """Up to `rounds` rounds of descent and refit on w (K, N); no row's loss is above its start."""
    best, loss = start, row_loss(w, h, start.values())
    for _ in range(rounds):
        before = float(loss.sum())
        for step in (descend, refit):
            best, loss = keep(w, h, best, loss, step(w, h, best))
        if float(loss.sum()) > 0.99 * before:
            break
    return best


def keep(w: Tensor, h: Tensor, old: Coded, loss: Tensor, new: Coded) -> tuple[Coded, Tensor]:
    """Row by row the better of two, and its loss."""
    fresh = row_loss(w, h, new.values())
    take = fresh < loss
    minimum = None if old.minimum is None or new.minimum is None else torch.where(take, new.minimum, old.minimum)
    codes, scale = torch.where(take, new.codes, old.codes), torch.where(take, new.scale, old.scale)
    return replace(old, codes=codes, scale=scale, minimum=minimum), torch.where(take, fresh, loss)


def descend(w: Tensor, h: Tensor, at: Coded) -> Coded:
    """One sweep of coordinate descent over the codes, largest H_jj first."""
    k = w.shape[0]
    order = torch.argsort(h.diagonal(), descending=True)
    hp = h[order][:, order]
    q, codes = at.values()[order], at.codes[order]
    gradient = hp @ (w[order] - q)
    group, inverse = (order // at.width).tolist(), 1 / hp.diagonal()
    for a in range(0, k, _BLOCK):
        b = min(a + _BLOCK, k)
        moved = torch.empty(b - a, w.shape[1], dtype=w.dtype, device=w.device)
        for i in range(a, b):
            codes[i], value = at.nearest(torch.addcmul(q[i], gradient[i], inverse[i]), group[i])
            torch.sub(value, q[i], out=moved[i - a])
            if i + 1 < b:
                gradient[i + 1 : b].addr_(hp[i, i + 1 : b], moved[i - a], alpha=-1)
        if b < k:
            gradient[b:].addmm_(hp[b:, a:b], moved, alpha=-1)
    back = torch.empty_like(codes)
    back[order] = codes
    return at.with_codes(back)


def refit(w: Tensor, h: Tensor, at: Coded) -> Coded:
    """The best scales (and minima) for the codes of every row."""
    k, n = w.shape
    g, width = at.scale.shape[0], at.width
    fill = g * width - k
    hp = torch.nn.functional.pad(h, (0, fill, 0, fill)).view(g, width, g * width)
    ones = hp.view(g * width, g, width).sum(-1)  # H times the indicator of each group
    scale, minimum = at.scale.clone(), None if at.minimum is None else at.minimum.clone()
    pull = torch.nn.functional.pad(h @ (w - at.values()), (0, 0, 0, fill))
    rows = max(1, _BUDGET // (g * g * width))
    for a in range(0, n, rows):
        part = slice(a, min(a + rows, n))
        v = at.codes[:, part] - (at.zero if minimum is None else 0.0)
        v = torch.nn.functional.pad(v, (0, 0, 0, fill)).t().reshape(-1, g, width)
        p = pull[:, part].t().reshape(-1, g, width)
        vh = torch.bmm(v.transpose(0, 1), hp).transpose(0, 1)  # (rows, G, K)
        normal = (vh.reshape(-1, g, g, width) * v.unsqueeze(1)).sum(-1)
        right = (v * p).sum(-1)
        if minimum is not None:
            cross = torch.bmm(v.transpose(0, 1), ones.view(g, width, g)).transpose(0, 1)
            corner = ones.view(g, width, g).sum(1).expand(len(v), g, g)
            normal = torch.cat([torch.cat([normal, cross], 2), torch.cat([cross.transpose(1, 2), corner], 2)], 1)
            right = torch.cat([right, p.sum(-1)], 1)
        delta = _solve(normal.double(), right.double()).float().t()
        scale[:, part] = ((at.step[:, part] + delta[:g]) / 2).clamp_min(0).to(scale.dtype)
        if minimum is not None:
            minimum[:, part] = (at.low[:, part] + delta[g:]).to(minimum.dtype)
    return replace(at, scale=scale, minimum=minimum)


def _solve(normal: Tensor, right: Tensor) -> Tensor:
    """Symmetric positive semidefinite systems, ridged relative to their own diagonal."""
    size = normal.diagonal(dim1=1, dim2=2)
    floor = size.amax(-1, keepdim=True).clamp_min(1e-30)
    normal = normal + torch.diag_embed(_RIDGE * size + 1e-12 * floor)
    factor, info = torch.linalg.cholesky_ex(normal)
    delta = torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1)
    bad = (info != 0) | ~torch.isfinite(delta).all(-1)
    return torch.where(bad.unsqueeze(-1), torch.zeros_like(delta), delta)
