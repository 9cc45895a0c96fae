"""From a dense weight (and calibration statistics) to the numbers a format stores. One file per algorithm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effllm.errors import CalibrationError, WeightError
from effllm.methods import NM, Bipolar, LowRank, Method, Monarch
from effllm.runtime.formats import bipolar, dense
from effllm.runtime.formats.base import Packed
from effllm.solvers.moments import Moments
from effllm.solvers.search import search


def check(w: Tensor, params: Method) -> None:
    """Raise WeightError where a weight cannot be packed."""
    if w.device.type == "meta":
        raise WeightError("E-WGT-META", "the weight is on the meta device and has no values", "load the model's weights first")
    if w.dim() != 2 or 0 in w.shape:
        raise WeightError("E-WGT-DIM", f"the weight has shape {tuple(w.shape)}, not (out, in)", "exclude the module with a dense rule")
    if not w.is_floating_point():
        raise WeightError("E-WGT-DTYPE", f"the weight is {w.dtype}, not floating point", "exclude the module with a dense rule")
    if not torch.isfinite(w).all():
        bad = int((~torch.isfinite(w)).sum())
        raise WeightError("E-WGT-NAN", f"{bad} of {w.numel()} weights are NaN or infinite", "repair the checkpoint")
    if isinstance(params, Bipolar) and not params.pad and bipolar.padded(w.shape[1], params.group) != w.shape[1]:
        raise WeightError("E-WGT-PAD", f"{w.shape[1]} columns are no multiple of the group {params.group}", "allow padding (pad=true) or choose another group")


def solve(w: Tensor, params: Method, moments: Moments | None = None) -> Packed:
    """Pack a dense (N, K) weight as `params` say, with calibration statistics where there are any."""
    check(w, params)
    if params.requires_calibration and moments is None:
        cause = f"the recipe asks for {params.label}, which needs calibration data"
        raise CalibrationError("E-CAL-NONE", cause, "pass calibration=, or choose a data-free solver")
    return _SOLVERS[type(params)](w.detach(), params, moments)


def _bipolar(w: Tensor, params: Bipolar, moments: Moments | None) -> Packed:
    exponent = _far(w)
    if exponent:
        near = _bipolar((w.double() * 2.0**-exponent).float(), params, moments)
        for key in ("scale", "minimum"):
            if key in near.tensors:
                near.tensors[key] = (near.tensors[key].double() * 2.0**exponent).float()
        return near
    if moments is None or params.solver == "search":
        return search(w, params)
    from effllm.solvers.gptq import gptq

    return gptq(w, params, moments.hessian)


def _lowrank(w: Tensor, params: LowRank, moments: Moments | None) -> Packed:
    from effllm.solvers.lowrank.solve import solve as solve_lowrank

    return solve_lowrank(w, params, moments)


def _monarch(w: Tensor, params: Monarch, moments: Moments | None) -> Packed:
    from effllm.solvers.monarch import solve as solve_monarch

    dtype = w.dtype if w.dtype in dense.DTYPES else torch.float32
    method = {"auto": "", "project": "plain"}.get(params.solver, params.solver)
    if params.solver == "project":
        moments = None
    return solve_monarch(
        w, moments, blocks=params.blocks, ratio=params.ratio, strided=params.form == "strided", pad=params.pad, method=method, dtype=dtype,
        bits=0 if params.bits == 16 else params.bits, group=params.group,
    )  # fmt: skip


def _nm(w: Tensor, params: NM, moments: Moments | None) -> Packed:
    from effllm.solvers.nm.solve import solve as solve_nm

    return solve_nm(w, params, moments)


def _far(w: Tensor) -> int:
    """The binary exponent of weights so large or small that their squares leave fp32; else 0. Powers of two scale exactly."""
    exponent = math.frexp(float(w.abs().max()))[1]
    if exponent > 128:
        raise WeightError("E-WGT-RANGE", f"weights up to 2^{exponent} do not fit fp32, the widest type of a scale", "rescale the layer")
    return exponent if abs(exponent) > 40 else 0


# a recipe's parameters -> the solver that understands them
_SOLVERS: dict[type[Method], Callable[[Tensor, Any, Moments | None], Packed]] = {Bipolar: _bipolar, LowRank: _lowrank, Monarch: _monarch, NM: _nm}
