"""The C++ provider of attention by segments, one per instruction set."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from effllm.kernels.cpu import plain
from effllm.kernels.cpu.build import Isa, missing
from effllm.lowering.op import Problem, Verdict

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fake(q: Tensor, k: Tensor, v: Tensor, table: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    """(1, T, H, Dv)."""
    return q.new_empty(1, q.shape[2], q.shape[1], v.shape[3])


FAKES: dict[str, Callable[..., Tensor]] = {"packed_attention": fake}


def supports(problem: Problem, isa: Isa) -> Verdict:
    """Whether this machine and this dtype fit the build."""
    lacking = missing(isa)
    if lacking:
        return Verdict(False, f"processor lacks {', '.join(lacking)}")
    return Verdict(problem.dtype in _DTYPES, f"queries are {problem.dtype}, not float32, bfloat16 or float16")


def register(isa: Isa, rank: int, ensure: Callable[[Isa], None]) -> None:
    """Add the provider of an instruction set; `ensure` builds and loads it on first use."""
    plain.register("packed_attention", isa, rank, ensure, supports)
