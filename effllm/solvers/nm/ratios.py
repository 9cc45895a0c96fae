"""How much to prune in which layer: everywhere the same, by the shape of each layer's spectrum, or up to a knee of a curve.

FARMS (arXiv 2506.06280): the heavier the tail of a matrix's eigenvalues, the better it was trained, and the less is pruned. The
tail's exponent depends on the matrix's aspect, so it is measured on square windows. The fit starts at the median eigenvalue, which is
stable where the published search for a start is not.

Essential sparsity (arXiv 2306.03805): what can go in one shot before quality falls sharply: the knee of quality over sparsity.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from effllm.errors import RecipeError
from effllm.solvers.nm.masks import check_weight

HIGHEST = 0.998  # share of a layer that may go at most


def uniform(sizes: Mapping[str, int], ratio: float) -> dict[str, float]:
    """The same ratio for every layer; sizes: weights per layer. RecipeError (E-RCP-RATIO) outside [0, 1)."""
    _check(ratio)
    return dict.fromkeys(sizes, ratio)


def farms(alphas: Mapping[str, float], sizes: Mapping[str, int], ratio: float, *, spread: float = 0.2) -> dict[str, float]:
    """Ratios rising with alpha, linearly from 1 - spread to 1 + spread times a common factor, so that `ratio` of all weights go.

    None above 0.998; what that cuts off is spread over the others. RecipeError (E-RCP-RATIO) where that cannot be reached.
    """
    _check(ratio)
    if not 0 <= spread < 1:
        raise RecipeError("E-RCP-RATIO", f"a spread of {spread}", "give a spread from 0 to just under 1")
    if ratio > HIGHEST:
        raise RecipeError("E-RCP-RATIO", f"no layer may lose more than {HIGHEST}, {ratio} was asked for", "prune less")
    names = list(alphas)
    alpha = torch.tensor([alphas[n] for n in names], dtype=torch.float64)
    size = torch.tensor([sizes[n] for n in names], dtype=torch.float64)
    low, high = alpha.min(), alpha.max()
    place = (alpha - low) / (high - low) if high > low else torch.full_like(alpha, 0.5)
    share = 1 - spread + 2 * spread * place
    fixed = torch.zeros_like(share, dtype=torch.bool)
    while True:
        left = ratio * size.sum() - HIGHEST * size[fixed].sum()
        found = torch.where(fixed, HIGHEST, share * left / (share * size)[~fixed].sum().clamp_min(1e-300))
        over = (found > HIGHEST) & ~fixed
        if not bool(over.any()):
            return dict(zip(names, found.tolist(), strict=True))
        fixed |= over


def farms_alpha(w: Tensor, *, side: int = 2000, steps: int = 10) -> float:
    """Tail exponent of w (N, K): squared singular values of steps x steps square windows, at most `side` wide, fitted together."""
    check_weight(w)
    w = w.detach()
    n, k = w.shape
    s = min(side, n, k)
    starts = [sorted(set(torch.linspace(0, extent - s, steps).long().tolist())) for extent in (n, k)]
    found = [torch.linalg.svdvals(w[i : i + s, j : j + s].float()).double() ** 2 for i in starts[0] for j in starts[1]]
    return power_law(torch.cat(found))


def power_law(values: Tensor) -> float:
    """Maximum-likelihood exponent of the upper half of positive values; 1 + 1/0 = inf for equal ones."""
    values = values[values > 1e-12].sort().values
    if len(values) < 2:
        return float("inf")  # nothing to lose: pruned most
    tail = values[len(values) // 2 :]
    total = float((tail / tail[0]).log().sum())
    return 1 + len(tail) / total if total > 0 else float("inf")


def knee(sparsity: Sequence[float], quality: Sequence[float], *, drop: float = 3.0) -> float:
    """The last sparsity before quality (higher is better, one figure per rising sparsity) falls sharply.

    Sharply: a step whose slope is more than `drop` times the mean slope of the whole curve below it, and above noise (a fifth of the curve's
    mean slope). Where no step does, the last sparsity.
    """
    if len(sparsity) != len(quality) or len(sparsity) < 3 or any(b <= a for a, b in itertools.pairwise(sparsity)):
        raise RecipeError("E-RCP-RATIO", "a knee needs three or more rising sparsities with a quality each", "measure more points")
    slope = [(quality[i] - quality[i + 1]) / (sparsity[i + 1] - sparsity[i]) for i in range(len(sparsity) - 1)]
    whole = max(0.0, (quality[0] - quality[-1]) / (sparsity[-1] - sparsity[0]))
    for i in range(1, len(slope)):
        before = max(0.0, (quality[0] - quality[i]) / (sparsity[i] - sparsity[0]))
        if slope[i] > max(drop * before, 0.2 * whole) and slope[i] > 0:
            return sparsity[i]
    return sparsity[-1]


def essential(weights: Mapping[str, Tensor], ratio: float) -> dict[str, float]:
    """Per layer the share that goes when the smallest `ratio` of all layers' weights go together (global magnitude).

    RecipeError (E-RCP-RATIO) where that would empty a layer.
    """
    _check(ratio)
    values = {name: w.detach().abs().flatten().float() for name, w in weights.items()}
    joined = torch.cat(list(values.values()))
    count = round(ratio * len(joined))
    bound = joined.kthvalue(count).values if count else joined.new_tensor(-1.0)
    shares = {name: float((v <= bound).double().mean()) for name, v in values.items()}
    empty = next((name for name, share in shares.items() if share >= 1), None)
    if empty is not None:
        raise RecipeError("E-RCP-RATIO", f"a global ratio of {ratio} leaves nothing of {empty}", "prune less, or every layer by the same share")
    return shares


def _check(ratio: float) -> None:
    if not 0 <= ratio < 1:
        raise RecipeError("E-RCP-RATIO", f"a ratio of {ratio}", "prune a share from 0 to just under 1")
