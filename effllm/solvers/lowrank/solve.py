"""From a dense weight to a stored low-rank one, as a recipe's LowRank parameters say."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effllm.errors import CalibrationError, WeightError
from effllm.methods import Bipolar, LowRank
from effllm.runtime.formats import dense, sltrain
from effllm.runtime.formats.base import Packed
from effllm.solvers.lowrank import quantize
from effllm.solvers.lowrank.afm import afm
from effllm.solvers.lowrank.asvd import asvd
from effllm.solvers.lowrank.factors import Factors, rank_for
from effllm.solvers.lowrank.fwsvd import fwsvd
from effllm.solvers.lowrank.pivots import pivoted
from effllm.solvers.lowrank.sparse import lost
from effllm.solvers.lowrank.sparse import sltrain as sparse_lowrank
from effllm.solvers.lowrank.svd import svd
from effllm.solvers.lowrank.whitened import whitened
from effllm.solvers.moments import Moments


def solve(w: Tensor, params: LowRank, moments: Moments | None) -> Packed:
    """Pack w (N, K). Raises WeightError (E-WGT-RANK) for a rank the weight cannot have, CalibrationError without what the solver needs."""
    dtype = w.dtype if w.dtype in dense.DTYPES else torch.float32
    if params.name == "sltrain":
        factors, s = _sparse(w, params, _needed(params, moments))
        a, b = (dense.make(t.to(dtype)) for t in (factors.a, factors.b))
        return sltrain.make(a, b, s, dtype=dtype)
    factors = factorize(w, params, moments)
    if params.pivoted and factors.channels is None and factors.rank < min(w.shape):
        factors = pivoted(factors)
    if params.bits == 16:
        return quantize.store(factors, dtype)
    return quantize.quantize(factors, Bipolar(bits=params.bits, group=params.group), moments)


def rank_of(shape: tuple[int, int], params: LowRank) -> int:
    """The rank of a weight (N, K): as asked, or by the ratio; sparse values and channels count against it."""
    n, k = shape
    if params.rank is not None:
        return params.rank
    ratio = params.ratio
    if params.name == "sltrain":
        ratio -= 2 * params.density  # an index beside each value
    elif params.name == "lost":
        ratio -= channels_of(k, params) * n / (n * k)
    if ratio <= 0:
        cause = f"nothing of ratio {params.ratio:g} is left for the factors beside a density of {params.density:g}"
        raise WeightError("E-WGT-RANK", cause, "lower the density")
    rank = rank_for(n, k, ratio, pivoted=params.pivoted and params.name not in ("sltrain", "lost"))
    return max(params.align, rank // params.align * params.align)


def channels_of(k: int, params: LowRank) -> int:
    """Whole input channels that LOST keeps."""
    return max(1, math.floor(params.density * k))


def factorize(w: Tensor, params: LowRank, moments: Moments | None) -> Factors:
    """The factors in plain form."""
    rank = rank_of((w.shape[0], w.shape[1]), params)
    if params.name in ("svd", "welore"):
        return svd(w, rank)
    seen = _needed(params, moments)
    if params.name == "lost":
        return lost(w, rank, channels_of(w.shape[1], params), seen)
    if params.name == "whitened":
        return whitened(w, rank, seen)
    return {"afm": afm, "asvd": asvd, "fwsvd": fwsvd}[params.name](w, rank, seen)


def _sparse(w: Tensor, params: LowRank, moments: Moments) -> tuple[Factors, Tensor]:
    return sparse_lowrank(w, rank_of((w.shape[0], w.shape[1]), params), int(params.density * w.numel()), moments)


def _needed(params: LowRank, moments: Moments | None) -> Moments:
    if moments is None:
        raise CalibrationError("E-CAL-NONE", f"{params.label} needs calibration data", "pass calibration=, or use svd")
    return moments


