"""From a dense weight (and calibration statistics) to the numbers a format stores. One file per algorithm."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effllm.errors import CalibrationError, WeightError
from effllm.recipe import Bipolar
from effllm.runtime.formats import bipolar
from effllm.runtime.formats.base import Packed
from effllm.solvers.moments import Moments
from effllm.solvers.search import search


def check(w: Tensor, params: Bipolar) -> None:
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
    if not params.pad and bipolar.padded(w.shape[1], params.group) != w.shape[1]:
        raise WeightError("E-WGT-PAD", f"{w.shape[1]} columns are no multiple of the group {params.group}", "allow padding (pad=true) or choose another group")


def solve(w: Tensor, params: Bipolar, moments: Moments | None = None) -> Packed:
    """Pack a dense (N, K) weight. With moments of its inputs the second-order solver runs unless the recipe says "search"."""
    check(w, params)
    if params.solver == "gptq" and moments is None:
        raise CalibrationError("E-CAL-NONE", "the recipe asks for gptq, which needs calibration data", "pass calibration=, or use solver=search")
    w = w.detach()
    exponent = _far(w)
    if exponent:
        near = solve((w.double() * 2.0**-exponent).float(), params, moments)
        for key in ("scale", "minimum"):
            if key in near.tensors:
                near.tensors[key] = (near.tensors[key].double() * 2.0**exponent).float()
        return near
    if moments is None or params.solver == "search":
        return search(w, params)
    from effllm.solvers.gptq import gptq

    return gptq(w, params, moments.hessian)


def _far(w: Tensor) -> int:
    """The binary exponent of weights so large or small that their squares leave fp32; else 0. Powers of two scale exactly."""
    exponent = math.frexp(float(w.abs().max()))[1]
    if exponent > 128:
        raise WeightError("E-WGT-RANGE", f"weights up to 2^{exponent} do not fit fp32, the widest type of a scale", "rescale the layer")
    return exponent if abs(exponent) > 40 else 0
