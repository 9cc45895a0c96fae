"""Sampling without replacement by Gumbel noise: the top of log-probabilities with noise on them, for tokens and for sequences.

The k largest of phi_v + G_v, with independent Gumbel G_v, are k draws without replacement from softmax(phi), in the order of their
size. For sequences (stochastic beam search, arXiv:1903.06059) the noise of a node's children is made to have its maximum at the node's
own perturbed value, so that the largest sequences of a level are draws without replacement from all sequences of that length.
"""

from __future__ import annotations

import torch
from torch import Tensor


def noise(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Independent standard Gumbel numbers, fp64, on the CPU."""
    return -torch.empty(shape, dtype=torch.float64).exponential_(generator=generator).log()


def top(perturbed: Tensor, count: int) -> list[int]:
    """Indices of the `count` largest in descending order; fewer where the rest is -inf."""
    values, index = perturbed.topk(min(count, perturbed.shape[-1]))
    return [int(i) for i, v in zip(index.tolist(), values.tolist(), strict=True) if v > -torch.inf]


def conditioned(parent: float, children: Tensor) -> Tensor:
    """Perturbed values (V,) of a node's children, moved so that the largest is `parent`, the node's own; their order stays.

    -log(exp(-parent) - exp(-max) + exp(-child)), in a form that neither overflows nor cancels.
    """
    t = parent - children + _log1mexp(children - children.max())
    return parent - t.clamp_min(0) - torch.log1p(torch.exp(-t.abs()))


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0."""
    return torch.where(x > -0.6931471805599453, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
