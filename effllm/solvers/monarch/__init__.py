"""Monarch factors of a dense weight: analytical projection, block-whitened projection, and block coordinate descent.

`solve` is the whole road from a weight (N, K) and the moments of its inputs to a stored weight; the files beside hold the steps, which are
pure functions over `Factors`. Error is ||(W - M) X|| throughout where there are moments, and ||W - M|| where there are none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.errors import CalibrationError, WeightError, nearest
from effllm.runtime.formats import dense, monarch
from effllm.runtime.formats.base import Packed
from effllm.solvers.moments import Moments
from effllm.solvers.monarch.descend import descend
from effllm.solvers.monarch.factors import Factors, Grid, rank_for
from effllm.solvers.monarch.metric import DAMP, Metric
from effllm.solvers.monarch.project import plain, whitened
from effllm.solvers.monarch.quantize import quantize

__all__ = ["DAMP", "METHODS", "Factors", "Grid", "Metric", "descend", "factorize", "plain", "quantize", "rank_for", "solve", "whitened"]

METHODS = ("plain", "whitened", "descent")
SWEEPS = 4


def factorize(w: Tensor, grid: Grid, metric: Metric | None = None, *, method: str = "", sweeps: int = SWEEPS) -> Factors:
    """Factors (fp64) of w (N, K). `method` is one of METHODS; by default the best that the statistics allow.

    Raises WeightError for a weight or a grid that does not fit, CalibrationError (E-CAL-NONE) for a method that lacks its statistics.
    """
    method = method or ("plain" if metric is None else "descent")
    if method not in METHODS:
        raise WeightError("E-WGT-SOLVER", f"unknown Monarch solver {method!r}", nearest(method, METHODS))
    w = grid.check(w)
    if method == "plain":
        return plain(w, grid)
    if metric is None:
        raise CalibrationError("E-CAL-NONE", f"the {method} projection needs calibration data", "pass calibration=, or use the plain projection")
    start = whitened(w, grid, metric)
    return start if method == "whitened" else descend(w, start, metric, sweeps)[0]


def solve(
    w: Tensor, moments: Moments | None = None, *, blocks: int | tuple[int, int] = 4, rank: int = 0, ratio: float = 0.0, multiple: int = 1,
    strided: bool = False, pad: bool = True, method: str = "", sweeps: int = SWEEPS, damp: float = DAMP,
    dtype: torch.dtype = torch.bfloat16, bits: int = 0, group: int = 32, offset: str = "auto",
) -> Packed:  # fmt: skip
    """Pack w (N, K) as Monarch factors with `blocks` (in, out) blocks and block rank `rank`, or the largest rank within `ratio` of N K values.

    The factors are stored in `dtype`, or as bipolar-INT of `bits` in groups of `group` (see Bipolar). With `moments.cross` the output of the
    dense model is the target. `multiple` rounds a rank from a ratio down. `pad=False` refuses blocks that do not divide the weight.
    Raises WeightError and CalibrationError.
    """
    n, k = w.shape if w.dim() == 2 else (0, 0)
    count = (blocks, blocks) if isinstance(blocks, int) else blocks
    if (rank > 0) == (ratio > 0):
        raise WeightError("E-WGT-RANK", f"rank={rank} and ratio={ratio}", "give a rank of at least 1 or a ratio above 0, one of the two")
    grid = Grid(n, k, *count, rank or rank_for(ratio, n, k, *count, multiple=multiple), strided)
    if not pad and (n % count[1] or k % count[0]):
        cause = f"{count[1]} x {count[0]} blocks do not divide a weight of shape {(n, k)}"
        raise WeightError("E-WGT-PAD", cause, "allow padding (pad=true) or choose block counts that divide")
    w = grid.check(w)
    metric = None if moments is None else Metric.of(moments, k, damp).to(w.device)
    aim = w if metric is None else metric.aim(w)
    factors = factorize(aim, grid, metric, method=method, sweeps=sweeps)
    if bits:
        first, second = quantize(aim, factors, metric, bits=bits, group=group, offset=offset)
    else:
        first, second = (dense.make(f.to(dtype)) for f in monarch.to_factors(factors.left, factors.right))
    return monarch.make(first, second, shape=(n, k), blocks_in=count[0], blocks_out=count[1], strided=strided)
