"""Run low-rank linears with bipolar factors: each stage by the bipolar GEMV or GEMM, the intermediate in x's dtype.

Launches   2 a sibling, each with what the tuner knows of a bipolar linear of its size (one more where it splits K); pivoted rows take one more.
           One row of siblings goes to its place in the output directly; more rows, whose outputs lie apart there, cost a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from effllm.kernels.triton import launch
from effllm.kernels.triton.config import Tiles
from effllm.kernels.triton.lowrank_place import place_kernel


@dataclass(frozen=True)
class Factor:
    """A packed (N, K) factor (layout words)."""

    codes: Tensor
    scale: Tensor
    minimum: Tensor | None
    n: int
    bits: int
    group: int
    zero: float


def stage(x: Tensor, factor: Factor, bias: Tensor | None, how: Tiles | None, out: Tensor | None = None) -> Tensor:
    """x (M, K) times one factor: (M, N), into `out` where given."""
    f = factor
    about = {"n": f.n, "bits": f.bits, "group": f.group, "zero": f.zero, "dtype": x.dtype}
    return launch.linear(x, None, f.codes, f.scale, f.minimum, bias, config=how, out=out, **about)  # type: ignore[arg-type]


def lowrank(
    x: Tensor, weights: Sequence[tuple[Factor, Factor]], pivots: Tensor | None = None, bias: Tensor | None = None,
    *, how: tuple[Tiles, Tiles] | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x (..., K) through siblings (A, B), their outputs side by side in x's dtype; `pivots` (N) and `bias` (N) are of a weight alone.

    `how` overrides the choices for B and A; `out` (M, N) is written in place of a new tensor.
    """
    flat = x.reshape(-1, x.shape[-1])
    m, n = flat.shape[0], sum(a.n for a, _ in weights) if pivots is None else pivots.shape[0]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device) if out is None else out
    first, second = how or (None, None)
    at = 0
    for a, b in weights if y.numel() else ():
        middle = stage(flat, b, None, first)
        if pivots is not None:
            _place(middle, stage(middle, a, None, second), pivots, bias, y)
        elif m == 1 or len(weights) == 1:
            stage(middle, a, bias, second, y[:, at : at + a.n])
        else:
            y[:, at : at + a.n] = stage(middle, a, None, second)
        at += a.n
    return y.reshape(*x.shape[:-1], n)


def _place(z: Tensor, rest: Tensor, pivots: Tensor, bias: Tensor | None, y: Tensor) -> None:
    m, n = y.shape
    with torch.cuda.device_of(y):
        bias = None if bias is None else bias.contiguous()
        place_kernel[(triton.cdiv(n, 256), m)](z, rest, pivots.contiguous(), bias, y, n, z.shape[1], BN=256, num_warps=2)
