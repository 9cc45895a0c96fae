"""Providers whose C++ op has the op's own name and takes its operands as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effllm.kernels.cpu.build import Isa
from effllm.lowering.op import OPS, Problem, Provider, Verdict


def register(op: str, isa: Isa, rank: int, ensure: Callable[[Isa], None], supports: Callable[[Problem, Isa], Verdict]) -> None:
    """Add the provider of an instruction set to a dense op; `ensure` builds and loads it on first use."""

    def call(*args: Any) -> Tensor:
        ensure(isa)
        y: Tensor = getattr(getattr(torch.ops, isa.namespace), op)(*args)
        return y

    OPS[op].register(Provider(f"cpu-{isa.name}", op, "cpu", "dense", lambda p: supports(p, isa), call, prepare=lambda: ensure(isa), rank=rank))
