"""The C++ provider of attention in prompts, one per instruction set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effllm.kernels.cpu import verdict
from effllm.kernels.cpu.build import Isa
from effllm.lowering.op import OPS, Problem, Provider, Verdict


def fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """(B, Q, H, Dv)."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


FAKES: dict[str, Callable[..., Tensor]] = {"prompt_attention": fake}


def supports(problem: Problem, isa: Isa) -> Verdict:
    """Whether this machine and this dtype fit the build, and torch's own kernel is not the faster one."""
    return verdict.supports(problem, isa)


def register(isa: Isa, rank: int, ensure: Callable[[Isa], None]) -> None:
    """Add the provider of an instruction set; `ensure` builds and loads it on first use."""

    def call(*args: Any) -> Tensor:
        ensure(isa)
        y: Tensor = getattr(torch.ops, isa.namespace).prompt_attention(*args)
        return y

    OPS["prompt_attention"].register(
        Provider(f"cpu-{isa.name}", "prompt_attention", "cpu", "dense", lambda p: supports(p, isa), call, prepare=lambda: ensure(isa), rank=rank)
    )
