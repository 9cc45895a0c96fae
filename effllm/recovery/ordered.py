"""Maestro's ordered dropout (arXiv 2308.14929): ranks that learn an order, so that they can be cut from the back.

At each step one layer runs with its first k ranks only, k uniform on 1..r, and a hierarchical group lasso
lambda * sum_k (||a[:, k:]|| + ||b[k:]||) pulls trailing ranks to zero; ranks that are small at the end are cut off. The dropped ranks
are zero in both factors while the step runs, which makes their gradients zero too: no module needs to know.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from effllm.errors import OptionError
from effllm.recovery.select import Pair


@dataclass(frozen=True)
class Ordered:
    """lasso: weight of the group lasso; cut: ranks whose share of the layer's largest one is below this go at the end; layers:
    how many layers are cut short at each step."""

    lasso: float = 1e-6
    cut: float = 1e-3
    layers: int = 1

    def __post_init__(self) -> None:
        if not self.lasso >= 0 or not 0 <= self.cut < 1 or self.layers < 1:
            cause = f"lasso={self.lasso}, cut={self.cut}, layers={self.layers}"
            raise OptionError("E-OPT-ORDERED", cause, "give a lasso of at least 0, a cut in [0, 1) and at least one layer")


@contextmanager
def dropped(pairs: list[Pair], options: Ordered, generator: torch.Generator) -> Iterator[list[tuple[str, int]]]:
    """Within the context, some layers have only their first k ranks; yields their names with k. Backward passes belong inside."""
    chosen = torch.randperm(len(pairs), generator=generator)[: options.layers].tolist()
    kept: list[tuple[Pair, int, Tensor, Tensor]] = []
    with torch.no_grad():
        for i in chosen:
            pair = pairs[i]
            k = int(torch.randint(1, pair.rank + 1, (), generator=generator))
            kept.append((pair, k, pair.left[:, k:].clone(), pair.b[k:].clone()))
            pair.left[:, k:] = 0
            pair.b[k:] = 0
    try:
        yield [(pair.name, k) for pair, k, _, _ in kept]
    finally:
        with torch.no_grad():
            for pair, k, a, b in kept:
                pair.left[:, k:] = a
                pair.b[k:] = b


def lasso_gradient(x: Tensor) -> Tensor:
    """Gradient of sum over k = 0..r-1 of ||x[:, k:]|| (Frobenius) for x (N, r): column j times the sum over k <= j of 1 / ||x[:, k:]||."""
    squares = x.double().square().sum(0)
    tails = squares.flip(0).cumsum(0).flip(0).sqrt()
    inverse = torch.where(tails > 0, 1 / tails.clamp_min(1e-300), torch.zeros_like(tails))
    return (x.double() * inverse.cumsum(0)).to(x.dtype)


def rank_left(a: Tensor, b: Tensor, cut: float) -> int:
    """Ranks to keep: up to the last one whose ||a[:, j]|| ||b[j]|| is at least `cut` of the largest; at least 1."""
    sizes = a.double().norm(dim=0) * b.double().norm(dim=1)
    large = (sizes >= cut * sizes.max()).nonzero()
    return int(large.max()) + 1 if len(large) and sizes.max() > 0 else 1
