"""What every CPU kernel asks of a machine and a problem."""

from __future__ import annotations

import torch

from effllm.kernels.cpu import build
from effllm.kernels.cpu.build import Isa
from effllm.lowering.op import Problem, Verdict

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def supports(problem: Problem, isa: Isa) -> Verdict:
    """Whether this machine and this problem fit the build."""
    lacking = build.missing(isa)
    if lacking:
        return Verdict(False, f"processor lacks {', '.join(lacking)}")
    if problem.dtype not in _FLOATS:
        return Verdict(False, f"activations are {problem.dtype}, not float32, bfloat16 or float16")
    return Verdict(True)
