"""R-Sparse (arXiv 2504.19449): columns of large |x_i| * |W_:,i| are multiplied as they are, the rest of x goes through a low rank.

y = W (M x) + U V ((1 - M) x), with M_i = |x_i| c_i > t, c_i the norm of column i and U V the best approximation of W of rank r. A
linear may read the share 1 - s of its weights: alpha of that in columns, the rest in factors, so that every split costs the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from effllm.errors import RecipeError

ALPHAS = (1.0, 0.98, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6)


def split(n: int, k: int, sparsity: float, alpha: float) -> tuple[float, int]:
    """(share of columns that is dropped, rank) of an (n, k) linear that reads (1 - sparsity) n k weights, alpha of them in columns.

    What rounding the rank down leaves over goes back to the columns.
    """
    budget = n * k * (1 - sparsity)
    rank = min(int(budget * (1 - alpha) / (n + k)), n, k)
    return min(1.0, max(0.0, 1 - (budget - rank * (n + k)) / (n * k))), rank


def factors(w: Tensor, rank: int, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """U (N, r) and V (r, K) with U V the best rank-r approximation of W (N, K), in fp64; with `scale` (K,) best for inputs of that size:
    W diag(scale) is approximated and V is divided by it."""
    weight = w.double()
    s = torch.ones(w.shape[1], dtype=torch.float64, device=w.device) if scale is None else scale.double()
    u, d, vh = torch.linalg.svd(weight * s, full_matrices=False)
    root = d[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank] / s


def norms(w: Tensor) -> Tensor:
    """Norms of the columns of W (N, K), fp32 (K,)."""
    return w.double().norm(dim=0).float()


def error(w: Tensor, x: Tensor, kept: Tensor, u: Tensor | None, v: Tensor | None) -> float:
    """Squared output error over inputs x (tokens, K) of which `kept` (same shape, bool) are multiplied exactly, relative to |W x|^2."""
    rest = torch.where(kept, 0.0, x)
    lost = rest @ w.t()
    if u is not None and v is not None:
        lost = lost - (rest @ v.t()) @ u.t()
    return float(lost.double().square().sum() / (x @ w.t()).double().square().sum().clamp_min(1e-30))


def search(
    names: Sequence[str], start: Mapping[str, float], objective: Callable[[Mapping[str, float]], float], *, budget: int, seed: int
) -> tuple[dict[str, float], float]:
    """The best alphas of a block's linears that `budget` calls of `objective` find: one linear's alpha is moved at a time to a random
    other value and kept where the objective falls. The same seed and budget give the same answer."""
    if budget < 1:
        raise RecipeError("E-RCP-VALUE", f"budget={budget}", "budget is a whole number from 1")
    g = torch.Generator().manual_seed(seed)
    best = {n: float(start[n]) for n in names}
    value = objective(best)
    for _ in range(budget - 1):
        name = names[int(torch.randint(len(names), (1,), generator=g))]
        others = [a for a in ALPHAS if a != best[name]]
        trial = best | {name: others[int(torch.randint(len(others), (1,), generator=g))]}
        found = objective(trial)
        if found < value:
            best, value = trial, found
    return best, value
