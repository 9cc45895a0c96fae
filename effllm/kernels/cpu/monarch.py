"""The CPU providers of the Monarch ops: fakes, configurations, and the arguments that the C++ ops take.

A configuration is {"path": "gemv" | "matmul", "threads": n} for dense factors, {"path": "codes", "threads": n} for bipolar ones; threads 0
for as many as the work is worth. Where M is dynamic the op gets the rows from which the products are PyTorch's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effllm.autotune import machines, use
from effllm.autotune.cost import Prediction, crossovers, values_of
from effllm.kernels.cpu import monarch_cost as cost
from effllm.kernels.cpu.build import Isa
from effllm.kernels.cpu.verdict import supports
from effllm.lowering.op import OPS, YES, Config, Problem, Provider, Verdict

NAMES = ("monarch_linear", "monarch_bipolar_linear")
LAYOUTS = {"monarch_linear": "dense", "monarch_bipolar_linear": "tile16"}
_VALUES = {"float32": 4, "bfloat16": 2, "float16": 2}
_NEVER = 1 << 40


def monarch_linear(x, w1, w2, bias, n, blocks_in, blocks_out, strided, threads=0, matmul_from=0):  # type: ignore[no-untyped-def]
    """The op's fake."""
    return x.new_empty(*x.shape[:-1], n)


def monarch_bipolar_linear(  # type: ignore[no-untyped-def]
    x, codes1, scale1, minimum1, codes2, scale2, minimum2, bias, n, blocks_in, blocks_out, rank, strided, bits1, group1, zero1, bits2, group2, zero2, threads=0
):
    """The op's fake."""
    return x.new_empty(*x.shape[:-1], n)


FAKES: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (monarch_linear, monarch_bipolar_linear)}


def refusal(problem: Problem) -> str:
    """Why the kernels do not take a problem, beyond what all CPU kernels check; empty where they do."""
    values = dict(problem.detail).get("values", "")
    if problem.op == "monarch_linear" and values not in _VALUES:
        return f"factors of {values or 'unknown type'}, the kernels take {', '.join(_VALUES)}"
    return ""


@dataclass(frozen=True)
class MonarchTuning:
    """The configurations of one instruction set's Monarch kernels (a lowering.op.Tuning)."""

    isa: str

    def configs(self, problem: Problem) -> Iterator[Config]:
        """Every legal configuration of a problem."""
        for path in paths(problem):
            for threads in sorted({0, 1, torch.get_num_threads()}):
                config = {"path": path, "threads": threads}
                if self.legal(problem, config):
                    yield config

    def legal(self, problem: Problem, config: Config) -> Verdict:
        """Whether a configuration can run here."""
        threads = config.get("threads")
        if set(config) != {"path", "threads"} or type(threads) is not int or not 0 <= threads <= torch.get_num_threads():
            return Verdict(False, f"{dict(config)} is no configuration of the Monarch kernels with {torch.get_num_threads()} threads")
        if config["path"] not in paths(problem):
            return Verdict(False, f"path {config['path']!r} is not one of {paths(problem)}")
        if config["path"] == "matmul" and threads:
            return Verdict(False, "PyTorch's products take PyTorch's threads")
        return YES

    def predict(self, problem: Problem, config: Config) -> Prediction:
        """The model's figures of a configuration. Automatic threads count as one or all, whichever is faster."""
        model = cost.models(self.isa)[str(config["path"])]
        symbols = values_of(problem) | machines.cpu()
        half = problem.dtype == torch.float32 or problem.dtype == torch.float16  # PyTorch has no fast fp16 products on most CPUs
        symbols |= {"value": _VALUES.get(str(dict(problem.detail).get("values", "")), 2), "gemm": symbols["product32" if half else "product"]}
        counts = [config["threads"]] if config["threads"] else [1, torch.get_num_threads()]
        return min((model.evaluate(symbols | {"threads": t}) for t in counts), key=lambda p: p.seconds)

    def first(self, problem: Problem) -> Config:
        """The model's choice: the path that it finds fastest, threads by the kernel."""
        return min((c for c in self.configs(problem) if c["threads"] == 0), key=lambda c: self.predict(problem, c).seconds)


def paths(problem: Problem) -> tuple[str, ...]:
    """The paths that a problem has."""
    return cost.PATHS if problem.op == "monarch_linear" else ("codes",)


@functools.lru_cache(maxsize=4096)
def matmul_from(problem: Problem, isa: str) -> int:
    """Rows from which PyTorch's products are predicted to be faster."""
    tuning = MonarchTuning(isa)
    changes = crossovers(lambda m: str(tuning.first(problem.at(m))["path"]))
    return next((m for m, path in changes if path == "matmul"), _NEVER)


def arguments(problem: Problem, config: Config | None, isa: str) -> dict[str, int]:
    """What the op takes beyond the graph op's arguments. Without a configuration the threshold, for any number of rows."""
    threads = 0 if config is None else int(config["threads"])
    if problem.op != "monarch_linear":
        return {"threads": threads}
    if config is None:
        return {"threads": 0, "matmul_from": matmul_from(problem, isa)}
    return {"threads": threads, "matmul_from": 1 if config["path"] == "matmul" else _NEVER}


def register(isa: Isa, rank: int, ensure: Callable[[Isa], None]) -> None:
    """Add the providers of an instruction set; `ensure` builds and loads it on first use."""
    for op in NAMES:
        OPS[op].register(_provider(op, isa, rank, ensure))


def _provider(op: str, isa: Isa, rank: int, ensure: Callable[[Isa], None]) -> Provider:
    def verdict(problem: Problem) -> Verdict:
        why = refusal(problem)
        return Verdict(False, why) if why else supports(problem, isa)

    def call(*args: Any, problem: Problem, config: Config | None = None) -> Tensor:
        ensure(isa)
        y: Tensor = getattr(getattr(torch.ops, isa.namespace), op)(*args, **arguments(problem, config, isa.name))
        return y

    return Provider(f"cpu-{isa.name}", op, "cpu", LAYOUTS[op], verdict, call, MonarchTuning(isa.name), lambda: ensure(isa), rank=rank)


use.on_forget(matmul_from.cache_clear)
