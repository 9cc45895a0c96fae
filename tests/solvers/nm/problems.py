"""A layer with outlier weights and correlated inputs of uneven size and nonzero mean."""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.solvers.moments import Moments, of_inputs


def layer(n: int = 32, k: int = 64, seed: int = 0, tokens: int = 512, mean: float = 0.3) -> tuple[Tensor, Moments, Tensor]:
    """Weight (N, K), moments, and the inputs (tokens, K) that they sum."""
    gen = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=gen) / k**0.5 + torch.eye(k)
    size = 10 ** (torch.rand(k, generator=gen) - 0.5)
    x = (torch.randn(tokens, k, generator=gen) @ mix + mean * torch.randn(k, generator=gen)) * size
    w = torch.randn(n, k, generator=gen) * 10 ** (torch.rand(n, 1, generator=gen) - 0.5)
    return w, of_inputs(x), x


def loss(w: Tensor, q: Tensor, x: Tensor) -> float:
    """Squared error of the outputs, summed over tokens."""
    return float(((w - q).double() @ x.double().t()).square().sum())
