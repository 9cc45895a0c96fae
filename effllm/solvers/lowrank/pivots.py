"""From a rank-r matrix to r of its rows and the coefficients of the others, with coefficients that stay near 1.

Which rows: those that span the largest volume. LU with partial pivoting gives a start; then the largest coefficient is made a pivot
until none exceeds `LIMIT` (maxvol, each exchange a rank-one update and a growth of the volume by that coefficient), so the form loses
no digits to storage in 16 or 8 bits that A B would keep.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.solvers.lowrank.factors import Factors, others

LIMIT = 1.5


def maxvol(u: Tensor, limit: float = LIMIT) -> tuple[Tensor, Tensor]:
    """Rows p (r,) of u (N, r) and C (N, r) with u = C u[p] and |C| <= limit. u has full column rank."""
    n, r = u.shape
    _, order, _ = _lu(u)
    rows = order[:r].clone()
    c = torch.linalg.solve(u[rows].t(), u.t()).t().contiguous()
    for _ in range(4 * n):
        flat = int(c.abs().argmax())
        i, j = divmod(flat, r)
        top = c[i, j].clone()
        if float(top.abs()) <= limit:
            break
        step = c[i].clone()
        step[j] -= 1
        c -= torch.outer(c[:, j].clone(), step / top)
        rows[j] = i
    return rows, torch.linalg.solve(u[rows].t(), u.t()).t().contiguous()


def _lu(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packed LU, the order of rows, and the swaps."""
    lu, swaps = torch.linalg.lu_factor(u)
    order = torch.arange(u.shape[0], device=u.device)
    for i, j in enumerate((swaps - 1).tolist()):
        order[[i, j]] = order[[j, i]]
    return lu, order, swaps


def pivoted(factors: Factors) -> Factors:
    """The same matrix in pivoted form. Rank-deficient factors lose their dependent directions."""
    q, t = torch.linalg.qr(factors.a.double())
    u, s, _ = torch.linalg.svd(t @ factors.b.double(), full_matrices=False)
    rank = max(1, int((s > s[0] * 1e-12).sum()))
    basis = q @ u[:, :rank]
    rows, c = maxvol(basis)
    rows, place = rows.sort()
    c = c[:, place]
    w = factors.a.double() @ factors.b.double()
    return Factors(factors.shape, c[others(rows, factors.shape[0])], w[rows], factors.shift, None, rows)
