"""The variants that a bench compares: recipes on the effllm road, and what torch offers without effllm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from effllm.errors import OptionError, nearest
from effllm.hf.static import StaticRunner
from effllm.hf.steady import steady_guards
from effllm.recipe import Recipe

BASELINES = ("eager-bf16", "inductor-bf16", "inductor-bf16-freezing", "inductor-fp32-autotune")
# No variant's modules change between its steps, and Dynamo's guards on them cost each step of the demo model 1.6 ms of 9.8
_STEADY = {"guard_filter_fn": steady_guards}
_OPTIONS: dict[str, dict[str, Any]] = {
    "inductor-bf16": {},
    "inductor-bf16-freezing": {"freezing": True},
    "inductor-fp32-autotune": {"freezing": True, "max_autotune": True},
}


@dataclass(frozen=True)
class Shape:
    """Token counts of a bench: decode `tokens` after `prompt`; prefill reads `prefill` tokens."""

    prompt: int = 32
    tokens: int = 64
    prefill: int = 512

    @property
    def length(self) -> int:
        """Size of the decode cache: prompt and tokens, rounded up to 128."""
        return -(-(self.prompt + self.tokens) // 128) * 128


@dataclass
class Variant:
    """A model that is ready to be timed, and how it came to be."""

    name: str
    recipe: str | None
    model: Any
    runner: StaticRunner
    notes: list[str] = field(default_factory=list)


def check_baselines(names: list[str]) -> None:
    """Raise OptionError with the nearest name where a baseline does not exist."""
    for name in names:
        if name not in BASELINES:
            raise OptionError("E-OPT-BASELINE", f"unknown baseline {name!r}", nearest(name, BASELINES))


def baseline(name: str, dense: Any, shape: Shape, *, compile_prefill: bool = True) -> Variant:
    """A baseline on the dense model; the bf16 ones share it, fp32 makes its own copy."""
    check_baselines([name])
    dtype = torch.float32 if "fp32" in name else torch.bfloat16
    model = dense if dense.dtype == dtype else copy.deepcopy(dense).to(dtype)
    if name == "eager-bf16":
        return Variant(name, None, model, _runner(model, None, shape, compile_prefill))

    def compiled(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(step, fullgraph=True, options=_OPTIONS[name] | _STEADY)

    return Variant(name, None, model, _runner(model, compiled, shape, compile_prefill))


def tuned(name: str, model: Any, shape: Shape, *, freezing: bool = True) -> Variant:
    """A model that another library has changed, under Inductor's max-autotune."""

    def compiled(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        options: dict[str, Any] = {"freezing": freezing, "max_autotune": True}
        return torch.compile(step, fullgraph=True, options=options | _STEADY)

    return Variant(name, None, model, _runner(model, compiled, shape, True))


def recipe(what: str, dense: Any, shape: Shape, calibration: Tensor | None = None, *, compile_prefill: bool = True) -> Variant:
    """`effllm.compress` on a copy of the dense model, then torch.compile with the effllm backend.

    `calibration` are windows of token ids (B, T) for solvers that need them.
    """
    from effllm.compression import compress

    parsed = Recipe.parse(what)
    model = copy.deepcopy(dense)
    report = compress(model, parsed, calibration=calibration)
    variant = packed(what, model, shape, compile_prefill=compile_prefill, kv=parsed.kv)
    variant.notes = [*report.notes, "calibrated" if calibration is not None else "data-free"]
    return variant


def packed(what: str, model: Any, shape: Shape, *, compile_prefill: bool = True, kv: str | None = None) -> Variant:
    """A model that is packed already (a checkpoint), with the effllm backend; `kv` is the format of its caches, None for dense ones."""
    import effllm.backend  # noqa: F401 - registers the backend for a checkout that is not installed

    def compiled(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(step, fullgraph=True, backend="effllm", options=dict(_STEADY))

    return Variant(f"effllm-{what}", what, model, _runner(model, compiled, shape, compile_prefill, kv))


def _runner(model: Any, compiled: Any, shape: Shape, compile_prefill: bool, kv: str | None = None) -> StaticRunner:
    return StaticRunner(model, compiled, length=shape.length, prefill_length=shape.prefill, compile_prefill=compile_prefill, kv=kv)
