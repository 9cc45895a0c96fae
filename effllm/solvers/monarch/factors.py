"""The grid of a Monarch weight, its rank for a budget, and factors on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effllm.errors import WeightError
from effllm.runtime.formats import monarch


def rank_for(ratio: float, n: int, k: int, blocks_in: int, blocks_out: int, *, multiple: int = 1) -> int:
    """The largest block rank whose factors hold at most `ratio` of N K values, a multiple of `multiple`, at most full.

    Raises WeightError (E-WGT-RANK) where not even rank one (or `multiple`) fits the ratio.
    """
    s, p = monarch.sizes(n, k, blocks_in, blocks_out)
    each = blocks_in * blocks_out * (s + p)
    rank = min(int(ratio * n * k / each + 1e-9), min(s, p)) // multiple * multiple
    if rank < 1:
        cause = f"{ratio:g} of {n} x {k} values hold no block rank of {multiple} in {blocks_out} x {blocks_in} blocks"
        raise WeightError("E-WGT-RANK", cause, f"use a ratio of at least {each * multiple / (n * k):.3g}, or fewer blocks")
    return rank


@dataclass(frozen=True)
class Grid:
    """Blocks of an (N, K) weight: `blocks_in` of columns, `blocks_out` of rows, each of rank `rank`. Refuses a rank that does not fit."""

    n: int
    k: int
    blocks_in: int
    blocks_out: int
    rank: int
    strided: bool = False

    def __post_init__(self) -> None:
        s, p = monarch.sizes(self.n, self.k, self.blocks_in, self.blocks_out)
        if not 1 <= self.rank <= min(s, p):
            raise WeightError("E-WGT-RANK", f"rank {self.rank} of blocks of shape {(s, p)}", f"give a rank from 1 to {min(s, p)}")

    @property
    def values(self) -> int:
        """Numbers that the factors hold."""
        s, p = monarch.sizes(self.n, self.k, self.blocks_in, self.blocks_out)
        return self.blocks_in * self.blocks_out * self.rank * (s + p)

    def check(self, w: Tensor) -> Tensor:
        """w (N, K) in fp64. Raises WeightError where it does not fit the grid or is not finite."""
        if w.device.type == "meta":
            raise WeightError("E-WGT-META", "the weight is on the meta device and has no values", "load the model's weights first")
        if w.shape != (self.n, self.k):
            raise WeightError("E-WGT-SHAPE", f"the weight has shape {tuple(w.shape)}, not {(self.n, self.k)}", "make the grid for this weight")
        if not w.is_floating_point():
            raise WeightError("E-WGT-DTYPE", f"the weight is {w.dtype}, not floating point", "exclude the module with a dense rule")
        if not torch.isfinite(w).all():
            raise WeightError("E-WGT-NAN", f"{int((~torch.isfinite(w)).sum())} of {w.numel()} weights are NaN or infinite", "repair the checkpoint")
        return w.detach().double()

    def blocks(self, w: Tensor) -> Tensor:
        """w (N, K) as (O, I, s, p)."""
        return monarch.to_blocks(w, self.blocks_in, self.blocks_out, self.strided)


@dataclass(frozen=True)
class Factors:
    """left (O, I, s, t) and right (O, I, t, p): block (o, i) of the weight is left[o, i] @ right[o, i]."""

    grid: Grid
    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """The (N, K) product."""
        return monarch.of_blocks(self.left @ self.right, self.grid.n, self.grid.k, self.grid.strided)

    def balanced(self) -> Factors:
        """The same products with columns of left and rows of right of equal norm, which rounding and quantization like best."""
        a, b = self.left.norm(dim=-2), self.right.norm(dim=-1)
        both = (a > 0) & (b > 0)
        scale = torch.where(both, (b / a.clamp_min(1e-300)).sqrt(), torch.ones_like(a))
        return Factors(self.grid, self.left * scale.unsqueeze(-2), self.right / scale.unsqueeze(-1))
