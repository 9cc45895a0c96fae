"""The C++ provider of attention in prompts, one per instruction set."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from effllm.kernels.cpu import plain, verdict
from effllm.kernels.cpu.build import Isa
from effllm.lowering.op import Problem, Verdict


def fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """(B, Q, H, Dv)."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


FAKES: dict[str, Callable[..., Tensor]] = {"prompt_attention": fake}


def supports(problem: Problem, isa: Isa) -> Verdict:
    """Whether this machine and this dtype fit the build, and torch's own kernel is not the faster one."""
    if isa.name == "portable":
        return Verdict(False, "torch's own kernel is faster than plain C++")
    return verdict.supports(problem, isa)


def register(isa: Isa, rank: int, ensure: Callable[[Isa], None]) -> None:
    """Add the provider of an instruction set; `ensure` builds and loads it on first use."""
    plain.register("prompt_attention", isa, rank, ensure, supports)
