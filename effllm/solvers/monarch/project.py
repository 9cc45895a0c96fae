"""Projections onto Monarch weights, block by block.

plain      each block's truncated SVD: nearest in Frobenius norm, error^2 = the sum of all discarded sigma^2 (arXiv 2204.00595).
whitened   each block W_oi nearest in the metric of its own inputs, H_ii = C C^T: with U the leading left singular vectors of W_oi C the best
           M_oi is U U^T W_oi, so nothing is ever divided by C. Coupling between blocks of columns is left to descend.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.solvers.monarch.factors import Factors, Grid
from effllm.solvers.monarch.metric import Metric, factor


def plain(w: Tensor, grid: Grid) -> Factors:
    """The Monarch weight nearest to w (N, K) fp64."""
    u, s, vh = torch.linalg.svd(grid.blocks(w), full_matrices=False)
    root = s[..., : grid.rank].sqrt()
    return Factors(grid, u[..., : grid.rank] * root.unsqueeze(-2), root.unsqueeze(-1) * vh[..., : grid.rank, :])


def whitened(w: Tensor, grid: Grid, metric: Metric) -> Factors:
    """The nearest blocks to those of w (N, K) fp64 in the metric of each block's inputs."""
    blocks = grid.blocks(w)
    u, _, _ = torch.linalg.svd(blocks @ factor(diagonal(metric, grid)), full_matrices=False)
    left = u[..., : grid.rank]
    return Factors(grid, left, left.transpose(-1, -2) @ blocks).balanced()


def diagonal(metric: Metric, grid: Grid) -> Tensor:
    """The diagonal blocks (I, p, p) of H."""
    p = -(-grid.k // grid.blocks_in)
    h = metric.padded(grid.blocks_in * p).view(grid.blocks_in, p, grid.blocks_in, p)
    return torch.stack([h[i, :, i] for i in range(grid.blocks_in)])
