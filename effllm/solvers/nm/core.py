"""Exact steps on the sparse core: the best n of m places and their values for one group after another.

With S (N, K) sparse, blocks A_i on the left, B_j on the right and E = W - A S B, the loss tr(E H E^T) of a change D of S is

    -2 <A^T E H B^T, D> + <A^T A D, D C>,   C = B H B^T.

For one row p and one group g that is a quadratic in m numbers with the matrix (A^T A)_pp C_gg: per set of places its optimum is a small
solve, and since C_gg is the same for every row, the solves are shared. Rows of one block of A meet in A^T A; replacing that matrix by the
diagonal of its absolute row sums (over the rows that move together) bounds it from above, so a sweep over all groups of many rows at
once never raises the loss.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations

import torch
from torch import Tensor

_ENUMERATE = 100  # patterns of a group that are all tried: 2:4 has 6, 6:8 28, 4:8 70; of 8:16's 12870 one is searched for
_BLOCK = 64  # columns between two updates of the far gradient


@lru_cache(maxsize=16)
def patterns(n: int, m: int) -> Tensor:
    """All masks (P, m) bool that keep n of m."""
    found = torch.zeros(len(list(combinations(range(m), n))), m, dtype=torch.bool)
    for i, places in enumerate(combinations(range(m), n)):
        found[i, list(places)] = True
    return found


def inverses(c: Tensor, masks: Tensor) -> Tensor:
    """For C (G, m, m) and masks (P, m): the inverse of each masked submatrix, zero elsewhere, (G, P, m, m)."""
    both = masks[:, :, None] & masks[:, None, :]
    eye = torch.eye(c.shape[-1], dtype=c.dtype, device=c.device)
    inner = torch.where(both, c[:, None], eye)
    return (torch.linalg.inv(inner) * both).contiguous()


def sweep(s: Tensor, keep: Tensor, gradient: Tensor, c: Tensor, curve: Tensor, n: int, m: int, *, free: bool = True) -> tuple[Tensor, Tensor]:
    """One pass over all groups: s and mask keep (K, R), gradient (K, R) = (A^T E H B^T)^T, C (K, K), curve (R,) >= the rows' share of A^T A.

    Returns the new s and mask. `free`: whether places may move, else only values do. gradient is used up.
    """
    k = s.shape[0]
    s, keep = s.clone(), keep.clone()
    scaled = gradient.div_(curve)
    cgg = torch.stack([c[g : g + m, g : g + m] for g in range(0, k, m)])
    count = len(list(combinations(range(m), n)))
    shared = free and count <= _ENUMERATE
    masks = patterns(n, m).to(s.device) if shared else None
    tables = inverses(cgg.double(), masks).float() if masks is not None else None
    block = -(-_BLOCK // m) * m
    for a in range(0, k, block):
        b = min(a + block, k)
        moved = torch.empty(b - a, s.shape[1], dtype=s.dtype, device=s.device)
        for g in range(a, b, m):
            old = s[g : g + m]
            pull = torch.addmm(scaled[g : g + m], cgg[g // m], old)  # minus half the gradient with the group at zero
            if tables is not None and masks is not None:
                new, keep[g : g + m] = _shared(pull, tables[g // m], masks)
            else:
                new, keep[g : g + m] = _searched(pull, keep[g : g + m], cgg[g // m], n, free)
            change = new - old
            moved[g - a : g - a + m] = change
            s[g : g + m] = new
            if g + m < b:
                scaled[g + m : b].addmm_(c[g + m : b, g : g + m], change, alpha=-1)
        if b < k:
            scaled[b:].addmm_(c[b:, a:b], moved, alpha=-1)
    return s, keep


def _shared(pull: Tensor, table: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Best values and places (m, R) out of the tabled inverses (P, m, m) of masks (P, m)."""
    m, rows = pull.shape
    squares = (pull[:, None] * pull[None]).view(m * m, rows)
    best = (table.view(-1, m * m) @ squares).argmax(0)
    return torch.bmm(table[best], pull.t().unsqueeze(2)).squeeze(2).t(), masks[best].t()


def _searched(pull: Tensor, keep: Tensor, c: Tensor, n: int, free: bool) -> tuple[Tensor, Tensor]:
    """Values on the places of keep (m, R); with `free` the better, row by row, of these and of dropping places one after another."""
    here, gain = _solve(pull, keep, c)
    if not free:
        return here, keep
    m, rows = pull.shape
    inverse = torch.linalg.inv(c.double()).expand(rows, m, m).clone()
    x = (inverse[0] @ pull.double()).t()
    alive = torch.ones(rows, m, dtype=torch.bool, device=pull.device)
    index = torch.arange(rows, device=pull.device)
    for _ in range(m - n):
        cost = torch.where(alive, x**2 / inverse.diagonal(dim1=1, dim2=2).clamp_min(1e-30), torch.inf)
        j = cost.argmin(1)
        column = inverse[index, :, j] / inverse[index, j, j][:, None]
        x = x - column * x[index, j][:, None]
        inverse = inverse - column[:, :, None] * inverse[index, j][:, None, :]
        alive[index, j] = False
        x[index, j] = 0
        inverse[index, j, j] = 1
    other, more = _solve(pull, alive.t(), c)
    return torch.where(more > gain, other, here), torch.where(more > gain, alive.t(), keep)


def _solve(pull: Tensor, mask: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Best values (m, R) on the places of mask (m, R), and what they take off the loss (R,)."""
    both = mask.t()[:, :, None] & mask.t()[:, None, :]
    inner = torch.where(both, c.double(), torch.eye(len(c), dtype=torch.float64, device=c.device))
    right = (pull * mask).t().double()
    x = torch.linalg.solve(inner, right)
    return x.t().to(pull.dtype), (x * right).sum(1)
