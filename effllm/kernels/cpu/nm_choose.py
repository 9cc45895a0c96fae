"""Configurations of the N:M CPU kernels: {"path": "registers" | "expand", "threads": n}, threads 0 for as many as the work is worth."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from effllm.autotune import machines
from effllm.autotune.cost import Prediction, crossovers, values_of
from effllm.kernels.cpu import build, nm_cost
from effllm.lowering.op import YES, Config, Problem, Verdict
from effllm.runtime.formats import nm


@dataclass(frozen=True)
class NmTuning:
    """The configurations of one build's N:M kernels (a lowering.op.Tuning)."""

    isa: str
    tiles: bool

    def configs(self, problem: Problem) -> Iterator[Config]:
        """Every legal configuration of a problem."""
        for path in nm_cost.PATHS:
            for threads in sorted({0, 1, torch.get_num_threads()}):
                config = {"path": path, "threads": threads}
                if self.legal(problem, config):
                    yield config

    def legal(self, problem: Problem, config: Config) -> Verdict:
        """Whether a configuration can run here."""
        threads = config.get("threads")
        if config.get("path") not in nm_cost.PATHS or not isinstance(threads, int) or not 0 <= threads <= torch.get_num_threads():
            return Verdict(False, f"{dict(config)} is no configuration of the N:M kernels with {torch.get_num_threads()} threads")
        if config["path"] == "expand" and self.tiles and problem.dtype != torch.bfloat16:
            return Verdict(False, "tiles expand to bf16 for bf16 activations only")
        return YES

    def predict(self, problem: Problem, config: Config) -> Prediction:
        """The model's figures of a configuration. Automatic threads count as one or all, whichever is faster."""
        model = nm_cost.models(self.isa, self.tiles)[config["path"]]
        symbols = symbols_of(problem, self.isa) | machines.cpu()
        if problem.dtype == torch.float32:
            symbols["product"] = symbols["product32"]
        counts = [config["threads"]] if config["threads"] else [1, torch.get_num_threads()]
        return min((model.evaluate(symbols | {"threads": t}) for t in counts), key=lambda p: p.seconds)

    def first(self, problem: Problem) -> Config:
        """The model's choice: the path that it finds fastest, threads by the kernel."""
        return min((c for c in self.configs(problem) if c["threads"] == 0), key=lambda c: self.predict(problem, c).seconds)


def symbols_of(problem: Problem, isa: str = "") -> dict[str, float]:
    """The problem's symbols with those of N:M weights."""
    found = {"block": 0.0, "value_bytes": 0.0} | values_of(problem)
    keep, of = int(found["keep"]), int(found["of"])
    bits = of if nm.index_kind(keep, of) == "bitmap" else keep * nm.WIDTHS[of]
    narrow = problem.dtype == torch.bfloat16 and ("values", "bfloat16") in problem.detail
    words = problem.bits > 0 and problem.group % max(1, 64 * keep // of) == 0  # groups of codes that are whole words of columns; 0 is the whole row
    fast = isa == "avx512" and (narrow or words) and {"avx512_bf16", "avx512_vbmi2"} <= build.cpu_flags()
    return found | {"index_bits": bits / of, "fast": float(fast), "coded": int(problem.bits > 0)}


@functools.lru_cache(maxsize=4096)
def thresholds(problem: Problem, isa: str, tiles: bool) -> dict[str, int]:
    """Rows from which `expand` is predicted to be faster (0: never)."""
    tuning = NmTuning(isa, tiles)
    changes = crossovers(lambda m: str(tuning.first(problem.at(m))["path"]))
    return {"threads": 0, "expand_from": next((m for m, path in changes if path == "expand"), 0)}


def arguments(problem: Problem, config: Config | None, isa: str, tiles: bool) -> dict[str, int]:
    """What the kernel's op takes. Without a configuration the threshold, for any number of rows."""
    if config is None:
        return dict(thresholds(problem.at(None), isa, tiles))
    return {"threads": config["threads"], "expand_from": 1 if config["path"] == "expand" else 0}
