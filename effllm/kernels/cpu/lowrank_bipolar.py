"""Providers of low-rank linears with bipolar factors on CPU (lowrank_bipolar.cpp): one call for both stages.

Configurations and costs are those of two bipolar linears (choose.py, cost.py) less one call: {"path": "registers" | "unpack" | "expand",
"threads": n}, the same path for both stages.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effllm.autotune import machines, use
from effllm.autotune.cost import Prediction, crossovers
from effllm.kernels.cpu import build
from effllm.kernels.cpu.build import Isa
from effllm.kernels.cpu.choose import CpuTuning
from effllm.lowering.lowrank_bipolar_linear import stages
from effllm.lowering.lowrank_linear import placed
from effllm.lowering.op import OPS, YES, Config, Problem, Provider, Verdict

NAMES = ("lowrank_bipolar_linear", "lowrank_bipolar_linear_many")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_NEVER = 1 << 40


@dataclass(frozen=True)
class LowrankBipolarTuning:
    """The configurations of one instruction set (a lowering.op.Tuning)."""

    isa: str

    def configs(self, problem: Problem) -> Iterator[Config]:
        """Every legal configuration of a problem."""
        yield from CpuTuning(self.isa).configs(stages(problem)[0])

    def legal(self, problem: Problem, config: Config) -> Verdict:
        """Whether a configuration can run here."""
        return CpuTuning(self.isa).legal(stages(problem)[0], config)

    def predict(self, problem: Problem, config: Config) -> Prediction:
        """The figures of both stages, less a call and, in one parallel region, the second waking of threads."""
        both = [CpuTuning(self.isa).predict(stage, config) for stage in stages(problem)]
        machine = machines.cpu()
        spared = 0.0 if config["path"] == "expand" else machine["call"] + (machine["wake"] if config["threads"] != 1 and torch.get_num_threads() > 1 else 0.0)
        total = [sum(getattr(p, name) for p in both) for name in ("nbytes", "flops", "instructions", "seconds", "bound")]
        total[3] = max(total[3] - spared, total[4])
        return Prediction(*total)

    def first(self, problem: Problem) -> Config:
        """The model's choice, threads by the kernel."""
        return min((c for c in self.configs(problem) if c["threads"] == 0), key=lambda c: self.predict(problem, c).seconds)


@functools.lru_cache(maxsize=4096)
def thresholds(problem: Problem, isa: str) -> dict[str, int]:
    """Rows from which `unpack` and `expand` are predicted to be faster than the path before (`expand_from` 0: never)."""
    tuning = LowrankBipolarTuning(isa)
    changes = crossovers(lambda m: str(tuning.first(problem.at(m))["path"]))
    unpack = next((m for m, path in changes if path != "registers"), _NEVER)
    return {"threads": 0, "unpack_from": max(1, unpack), "expand_from": next((m for m, path in changes if path == "expand"), 0)}


def arguments(problem: Problem, config: Config | None, isa: str) -> dict[str, int]:
    """What the op takes. Without a configuration the thresholds, for any number of rows."""
    if config is None:
        return dict(thresholds(problem.at(None), isa))
    path = config["path"]
    return {"threads": config["threads"], "unpack_from": 1 if path == "unpack" else _NEVER, "expand_from": 1 if path == "expand" else 0}


def fake(x, ac, as_, am, bc, bs, bm, bias, n, rank, a_bits, a_group, a_zero, b_bits, b_group, b_zero, threads=0, unpack_from=0, expand_from=0):  # type: ignore[no-untyped-def]
    """Shape and dtype of the output."""
    return x.new_empty(*x.shape[:-1], n or sum(c.shape[0] * 16 for c in ac))


FAKES: dict[str, Callable[..., Tensor]] = {"lowrank_bipolar": fake}


def supports(problem: Problem, isa: Isa) -> Verdict:
    """Whether this machine and this problem fit the build."""
    lacking = build.missing(isa)
    if lacking:
        return Verdict(False, f"processor lacks {', '.join(lacking)}")
    if problem.dtype not in _FLOATS:
        return Verdict(False, f"activations are {problem.dtype}, not float32, bfloat16 or float16")
    bits = (problem.bits, int(dict(problem.detail)["b_bits"]))
    if not all(1 <= b <= 8 for b in bits):
        return Verdict(False, f"factors of {bits[1]} and {bits[0]} bits; the kernel takes 1 to 8 in both, run a mixed weight as two linears")
    return YES


def provider(op: str, isa: Isa, rank: int, ensure: Callable[[Isa], None]) -> Provider:
    """The provider of an op on one instruction set."""

    def run(x: Tensor, *args: Any, problem: Problem, config: Config | None) -> Tensor:
        ensure(isa)
        y: Tensor = getattr(torch.ops, isa.namespace).lowrank_bipolar(x, *args, **arguments(problem, config, isa.name))
        return y

    def one(x, ac, as_, am, bc, bs, bm, pivots, bias, n, rank, *grids, problem, config=None):  # type: ignore[no-untyped-def]
        def some(t: Tensor | None) -> list[Tensor]:
            return [] if t is None else [t]

        if pivots is not None:  # the rows of B are outputs themselves: two linears, and one gather
            ensure(isa)
            linear = getattr(torch.ops, isa.namespace).linear
            z = linear(x, bc, bs, bm, None, rank, *grids[3:])
            return placed(z, linear(z, ac, as_, am, None, n, *grids[:3]), pivots, bias)
        return run(x, [ac], [as_], some(am), [bc], [bs], some(bm), bias, n, rank, *grids, problem=problem, config=config)

    def many(x, ac, as_, am, bc, bs, bm, *grids, problem, config=None):  # type: ignore[no-untyped-def]
        return run(x, list(ac), list(as_), list(am), list(bc), list(bs), list(bm), None, 0, 0, *grids, problem=problem, config=config)

    call: Any = many if op.endswith("_many") else one
    tuning = LowrankBipolarTuning(isa.name)
    return Provider(f"cpu-{isa.name}", op, "cpu", "tile16", lambda p: supports(p, isa), call, tuning, lambda: ensure(isa), rank=rank)


def register(isa: Isa, rank: int, ensure: Callable[[Isa], None]) -> None:
    """Add one instruction set's providers to the ops."""
    for op in NAMES:
        OPS[op].register(provider(op, isa, rank, ensure))


use.on_forget(thresholds.cache_clear)
