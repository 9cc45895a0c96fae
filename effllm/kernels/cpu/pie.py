"""Providers of the C++ kernels for edited caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effllm.kernels.cpu import build
from effllm.kernels.cpu.build import Isa
from effllm.lowering.op import OPS, Problem, Provider, Verdict
from effllm.lowering.pie import floats_only


def pie_apply(k: Tensor, source: Tensor | None, row: Tensor, cos: Tensor, sin: Tensor, half: bool) -> Tensor:
    """Fake of the C++ op."""
    return k.new_empty(k.shape[0], k.shape[1], row.shape[0], k.shape[3])


def rotated_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, row: Tensor, cos: Tensor, sin: Tensor, half: bool, scale: float
) -> Tensor:
    """Fake of the C++ op."""
    return q.new_empty(q.shape)


FAKES: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (pie_apply, rotated_attention)}


def register(isa: Isa, rank: int, ensure: Callable[[Isa], None]) -> None:
    """Add the providers of an instruction set; `ensure` builds and loads it on first use."""
    for op in FAKES:
        OPS[op].register(_provider(op, isa, rank, ensure))


def _provider(op: str, isa: Isa, rank: int, ensure: Callable[[Isa], None]) -> Provider:
    def supports(problem: Problem) -> Verdict:
        lacking = build.missing(isa)
        if lacking:
            return Verdict(False, f"processor lacks {', '.join(lacking)}")
        return floats_only(problem)

    def call(*args: Any) -> Tensor:
        ensure(isa)
        y: Tensor = getattr(getattr(torch.ops, isa.namespace), op)(*(a == "half" if isinstance(a, str) else a for a in args))
        return y

    return Provider(f"cpu-{isa.name}", op, "cpu", "dense", supports, call, prepare=lambda: ensure(isa), rank=rank)
