"""Configurations of the CPU linear kernels, and the model's first choice among them.

A configuration is {"path": "registers" | "unpack" | "expand", "threads": n}, threads 0 for as many as the work is worth. Where M is
dynamic the op gets the rows at which the next path takes over, solved from the same model.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from effllm.autotune import machines
from effllm.autotune.cost import Prediction, crossovers, values_of
from effllm.kernels.cpu import cost
from effllm.lowering.op import YES, Config, Problem, Verdict
from effllm.runtime.host import cpu_flags

_NEVER = 1 << 40


@dataclass(frozen=True)
class CpuTuning:
    """The configurations of one instruction set's linear kernels (a lowering.op.Tuning)."""

    isa: str

    def configs(self, problem: Problem) -> Iterator[Config]:
        """Every legal configuration of a problem."""
        for path in cost.PATHS:
            for threads in sorted({0, 1, torch.get_num_threads()}):
                config = {"path": path, "threads": threads}
                if self.legal(problem, config):
                    yield config

    def legal(self, problem: Problem, config: Config) -> Verdict:
        """Whether a configuration can run here."""
        threads = config.get("threads")
        if config.get("path") not in cost.PATHS or not isinstance(threads, int) or not 0 <= threads <= torch.get_num_threads():
            return Verdict(False, f"{dict(config)} is no configuration of the CPU kernels with {torch.get_num_threads()} threads")
        if config["path"] != "expand":
            return YES
        if problem.act == "a8" or problem.dtype != torch.bfloat16:
            return Verdict(False, "only bf16 activations are multiplied by expanded weights")
        if self.isa != "avx512" or "avx512_bf16" not in cpu_flags():
            return Verdict(False, "the processor has no bf16 products")
        return YES

    def predict(self, problem: Problem, config: Config) -> Prediction:
        """The model's figures of a configuration. Automatic threads count as one or all, whichever is faster."""
        model = cost.models(self.isa)[config["path"]]
        symbols = values_of(problem) | machines.cpu()
        counts = [config["threads"]] if config["threads"] else [1, torch.get_num_threads()]
        return min((model.evaluate(symbols | {"threads": t}) for t in counts), key=lambda p: p.seconds)

    def first(self, problem: Problem) -> Config:
        """The model's choice: the path that it finds fastest, threads by the kernel."""
        return min((c for c in self.configs(problem) if c["threads"] == 0), key=lambda c: self.predict(problem, c).seconds)


@functools.lru_cache(maxsize=4096)
def thresholds(problem: Problem, isa: str) -> dict[str, int]:
    """Rows from which `unpack` and `expand` are predicted to be faster than the path before (`expand_from` 0: never)."""
    tuning = CpuTuning(isa)
    changes = crossovers(lambda m: str(tuning.first(problem.at(m))["path"]))
    unpack = next((m for m, path in changes if path != "registers"), _NEVER)
    expand = next((m for m, path in changes if path == "expand"), 0)
    return {"threads": 0, "unpack_from": max(1, unpack), "expand_from": expand}


def arguments(problem: Problem, config: Config | None, isa: str) -> dict[str, int]:
    """What the op takes: `threads`, `unpack_from`, `expand_from`. Without a configuration the thresholds, for any number of rows."""
    if config is None:
        found = dict(thresholds(problem, isa))
    else:
        path = config["path"]
        found = {"threads": config["threads"], "unpack_from": 1 if path == "unpack" else _NEVER, "expand_from": 1 if path == "expand" else 0}
    if problem.act == "a8":
        del found["expand_from"]
    return found
