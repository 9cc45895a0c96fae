"""Cost of the dense linear that a rewrite has to beat: the weight's bytes, or its products at the rate of PyTorch's own."""

from __future__ import annotations

import sympy
import torch

from effllm.autotune import machines
from effllm.autotune.cost import BANDWIDTH, CALL, K, M, Model, N, values_of
from effllm.lowering.op import Problem

SIZE, RATE = sympy.symbols("size rate", positive=True)  # bytes of an element; multiply-adds per second of the whole machine

_BYTES = (N * K + M * (N + K)) * SIZE
_BOUND = sympy.Max(_BYTES / BANDWIDTH, M * N * K / RATE)
MODEL = Model(_BYTES, 2 * M * N * K, sympy.Integer(0), _BOUND + CALL, _BOUND)


def seconds(problem: Problem) -> float:
    """Predicted time of the dense linear of a problem, in the dtype of its activations, on the problem's device."""
    wide = problem.dtype == torch.float32
    if problem.device == "cpu":
        found = machines.cpu()
        rate = found["product32" if wide else "product"] * found["cores"]
    else:
        found = machines.gpu(problem.device)
        rate = found["mma32" if wide else "mma16"] / 2
    return MODEL.time(values_of(problem) | found | {"size": 4.0 if wide else 2.0, "rate": rate})
