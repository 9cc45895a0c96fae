"""Providers of the low-rank linears on CPU: one call for both stages.

A configuration is {"path": "fused" | "products", "threads": n}, threads 0 for as many as the work is worth. Where M is dynamic the op gets
the rows from which PyTorch's own products take over, solved from the cost model.
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
from effllm.kernels.cpu import build, lowrank_cost
from effllm.kernels.cpu.build import Isa
from effllm.lowering.op import OPS, YES, Config, Problem, Provider, Verdict

NAMES = ("lowrank_linear", "lowrank_linear_many", "sparse_lowrank_linear")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LowrankTuning:
    """The configurations of one instruction set's two-stage kernels (a lowering.op.Tuning)."""

    isa: str

    def configs(self, problem: Problem) -> Iterator[Config]:
        """Every legal configuration of a problem."""
        for path in lowrank_cost.PATHS:
            for threads in sorted({0, 1, torch.get_num_threads()}) if path == "fused" else [0]:
                yield {"path": path, "threads": threads}

    def legal(self, problem: Problem, config: Config) -> Verdict:
        """Whether a configuration can run here."""
        threads = config.get("threads")
        if config.get("path") not in lowrank_cost.PATHS or not isinstance(threads, int) or not 0 <= threads <= torch.get_num_threads():
            return Verdict(False, f"{dict(config)} is no configuration of the low-rank kernels with {torch.get_num_threads()} threads")
        return YES

    def predict(self, problem: Problem, config: Config) -> Prediction:
        """The model's figures of a configuration. Automatic threads count as one or all, whichever is faster."""
        model = lowrank_cost.models(self.isa)[config["path"]]
        counts = [config["threads"]] if config["threads"] else [1, torch.get_num_threads()]
        return min((model.evaluate(lowrank_cost.values(problem, machines.cpu(), t)) for t in counts), key=lambda p: p.seconds)

    def first(self, problem: Problem) -> Config:
        """The model's choice: the path that it finds fastest, threads by the kernel."""
        return min(({"path": path, "threads": 0} for path in lowrank_cost.PATHS), key=lambda c: self.predict(problem, c).seconds)


@functools.lru_cache(maxsize=4096)
def products_from(problem: Problem, isa: str) -> int:
    """Rows from which PyTorch's products are predicted to be faster; 0: never."""
    tuning = LowrankTuning(isa)
    changes = crossovers(lambda m: str(tuning.first(problem.at(m))["path"]))
    return next((m for m, path in changes if path == "products"), 0)


def arguments(problem: Problem, config: Config | None, isa: str) -> dict[str, int]:
    """What the op takes: `threads`, `products_from`. Without a configuration the crossover, for any number of rows."""
    if config is None:
        return {"threads": 0, "products_from": products_from(problem.at(None), isa)}
    return {"threads": config["threads"], "products_from": 1 if config["path"] == "products" else 0}


def fake(x, a, b, channels, pivots, bias, values, columns, rows, threads=0, products_from=0):  # type: ignore[no-untyped-def]
    """Shape and dtype of the output."""
    return x.new_empty(*x.shape[:-1], sum(f.shape[0] for f in a) + (sum(f.shape[0] for f in b) if pivots else 0))


FAKES: dict[str, Callable[..., Tensor]] = {"lowrank": fake}


def supports(problem: Problem, isa: Isa) -> Verdict:
    """Whether this machine and this problem fit the build."""
    lacking = build.missing(isa)
    if lacking:
        return Verdict(False, f"processor lacks {', '.join(lacking)}")
    if problem.dtype not in _FLOATS:
        return Verdict(False, f"activations are {problem.dtype}, not float32, bfloat16 or float16")
    factor = dict(problem.detail).get("factor", "bfloat16")
    if factor not in ("float32", "bfloat16", "float16"):
        return Verdict(False, f"factors are {factor}, not float32, bfloat16 or float16")
    return YES


def provider(op: str, isa: Isa, rank: int, ensure: Callable[[Isa], None]) -> Provider:
    """The provider of an op on one instruction set."""

    def run(x: Tensor, a: list[Tensor], b: list[Tensor], rest: tuple[Any, ...], problem: Problem, config: Config | None) -> Tensor:
        ensure(isa)
        y: Tensor = getattr(torch.ops, isa.namespace).lowrank(x, a, b, *rest, **arguments(problem, config, isa.name))
        return y

    def one(
        x: Tensor, a: Tensor, b: Tensor, channels: Tensor | None, pivots: Tensor | None, bias: Tensor | None, *, problem: Problem, config: Config | None = None
    ) -> Tensor:  # fmt: skip
        return run(x, [a], [b], (channels, [] if pivots is None else [pivots], bias, None, None, None), problem, config)

    def many(x: Tensor, a: list[Tensor], b: list[Tensor], pivots: list[Tensor], *, problem: Problem, config: Config | None = None) -> Tensor:
        return run(x, list(a), list(b), (None, list(pivots), *(None,) * 4), problem, config)

    def sparse(
        x: Tensor, a: Tensor, b: Tensor, values: Tensor, columns: Tensor, rows: Tensor, bias: Tensor | None, *, problem: Problem, config: Config | None = None
    ) -> Tensor:
        return run(x, [a], [b], (None, [], bias, values, columns, rows), problem, config)

    call: Any = dict(zip(NAMES, (one, many, sparse), strict=True))[op]
    return Provider(f"cpu-{isa.name}", op, "cpu", "dense", lambda p: supports(p, isa), call, LowrankTuning(isa.name), lambda: ensure(isa), rank=rank)


def register(isa: Isa, rank: int, ensure: Callable[[Isa], None]) -> None:
    """Add one instruction set's providers to the ops."""
    for op in NAMES:
        OPS[op].register(provider(op, isa, rank, ensure))


use.on_forget(products_from.cache_clear)
