"""Configurations of the CPU linear kernels, and the model's first choice among them.

    {"path": "registers", "threads": t, "rows": r}                               r tokens of a pass over the codes
    {"path": "single",    "threads": t, "tiles": s}                              s tiles of 16 rows side by side
    {"path": "unpack",    "threads": t, "rows": r, "tiles": s, "chunk": KiB}     activations that stay in cache
    {"path": "expand",    "threads": t}

threads 0 stands for as many as the work is worth. Where M is dynamic the op gets the rows at which the next path takes over, solved
from the same model, and chooses the rest itself.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from effllm.autotune import machines
from effllm.autotune.cost import Prediction, crossovers, values_of
from effllm.autotune.key import bucket
from effllm.kernels.cpu import cost
from effllm.lowering.op import YES, Config, Problem, Verdict
from effllm.runtime.host import cpu_flags

_NEVER = 1 << 40
_CHUNKS = (256, 512)  # KiB: half and all of what the second-level cache leaves beside the codes
# rows and tiles of a pass of `unpack` by digits of an activation, as bipolar.h has them; the first is the one for few tokens
_PASSES = {1: ((4, 2), (6, 2), (8, 2), (4, 4)), 2: ((3, 2), (4, 2), (2, 4)), 3: ((2, 2),)}


@dataclass(frozen=True)
class CpuTuning:
    """The configurations of one instruction set's linear kernels (a lowering.op.Tuning)."""

    isa: str

    def configs(self, problem: Problem) -> Iterator[Config]:
        """Every legal configuration of a problem."""
        threads = sorted({0, 1, torch.get_num_threads()})
        for path in cost.PATHS:
            if self._refusal(problem, path):
                continue
            for fields in self._fields(problem, path):
                yield from ({"path": path, "threads": t, **fields} for t in threads)

    def legal(self, problem: Problem, config: Config) -> Verdict:
        """Whether a configuration can run here: exactly what `configs` yields, with any number of threads."""
        path, threads, most = config.get("path"), config.get("threads"), torch.get_num_threads()
        if path not in cost.PATHS or type(threads) is not int or not 0 <= threads <= most:
            return Verdict(False, f"{dict(config)} is no configuration of the CPU kernels with {most} threads")
        why = self._refusal(problem, path)
        if why:
            return Verdict(False, why)
        fields = {name: value for name, value in config.items() if name not in ("path", "threads")}
        allowed = self._fields(problem, path)
        if fields in allowed:
            return YES
        names = ", ".join(allowed[0]) or "no further field"
        if set(fields) != set(allowed[0]):
            return Verdict(False, f"{path!r} takes {names}, the configuration has {', '.join(sorted(fields)) or 'none of them'}")
        return Verdict(False, f"{path!r} has no pass of {fields} for {problem.m} rows")

    def predict(self, problem: Problem, config: Config) -> Prediction:
        """The model's figures of a configuration. Automatic threads count as one or all, whichever is faster."""
        model = cost.models(self.isa)[config["path"]]
        return min((model.evaluate(values) for values in self._values(problem, config)), key=lambda p: p.seconds)

    @staticmethod
    def _values(problem: Problem, config: Config) -> list[dict[str, float]]:
        """The model's symbols, for one thread and for all where threads are automatic."""
        sizes = {name: value for name, value in config.items() if name not in ("path", "threads")}
        symbols = values_of(problem) | machines.cpu() | sizes
        counts = [config["threads"]] if config["threads"] else [1, torch.get_num_threads()]
        return [symbols | {"threads": t} for t in counts]

    def first(self, problem: Problem) -> Config:
        """The model's choice: the configuration that it finds fastest, threads by the kernel."""
        models = cost.models(self.isa)  # their times alone: this is asked before a model's first token

        def seconds(config: Config) -> float:
            return min(models[config["path"]].time(values) for values in self._values(problem, config))

        return min((c for c in self.configs(problem) if c["threads"] == 0), key=seconds)

    def arguments(self, problem: Problem, config: Config | None) -> dict[str, int]:
        """What the op takes besides its operands."""
        return arguments(problem, config, self.isa)

    def _refusal(self, problem: Problem, path: str) -> str:
        """Why a path cannot run a problem here; empty where it can."""
        if path == "single" and (problem.act != "a8" or (problem.m or 1) > 1):
            return "one token of int8 activations is what 'single' takes"
        if path == "single" and (self.isa != "avx512" or "avx512vbmi" not in cpu_flags()):
            return "the processor has no byte permutation across 64 bytes"
        if path == "unpack" and self._narrow(problem):
            return "without byte products that accumulate, codes are taken apart in registers for any number of tokens"
        return self._not_expanded(problem) if path == "expand" else ""

    def _not_expanded(self, problem: Problem) -> str:
        """Why weights are not expanded for a problem: to bf16 (expand.h), or to fp32 where no products of bytes accumulate (expand_fp32.h)."""
        if problem.act == "a8":
            return "int8 activations are multiplied by codes"
        if self.isa == "avx2":
            return "" if problem.dtype == torch.float32 else "16-bit activations are as fast as two digits, whose codes need not be expanded"
        if problem.dtype != torch.bfloat16:
            return "only bf16 activations are multiplied by expanded weights"
        return "" if self.isa == "avx512" and "avx512_bf16" in cpu_flags() else "the processor has no bf16 products"

    def _narrow(self, problem: Problem) -> bool:
        """Whether products are of words or short sums (narrow.h)."""
        digits = values_of(problem)["digits"]
        return self.isa == "avx2" and (digits == 2 or (digits == 1 and (problem.bits == 8 or problem.bits <= 5)))

    def _fields(self, problem: Problem, path: str) -> list[dict[str, int]]:
        """The further fields of a path, every combination that differs in what runs."""
        # what one member of a bucket of the store may run, all may: a pass of more rows than there are is one of fewer
        m, digits = bucket(max(1, problem.m or 1)), int(values_of(problem)["digits"])
        if path == "single":
            return [{"tiles": t} for t in (1, 2, 4)]
        if path == "registers":
            return [{"rows": r} for r in ((4, 8) if m >= 8 and digits < 3 and self.isa == "avx512" else (4,))]
        if path == "expand":
            return [{}]
        passes = _PASSES[digits] if self.isa == "avx512" else ((max(1, 2 // digits), 2),)
        # few rows are slower wherever more fit
        passes = tuple(p for p in passes if p[0] <= m and not (p == (4, 2) and digits == 1 and m >= 6)) or passes[:1]
        held = m * digits * (problem.k + cost.PAD) >> 10
        chunks = [c for c in _CHUNKS if c == _CHUNKS[0] or held > c // 2]
        return [{"rows": r, "tiles": t, "chunk": c} for r, t in passes for c in chunks]


@functools.lru_cache(maxsize=4096)
def thresholds(problem: Problem, isa: str) -> dict[str, int]:
    """Rows from which `unpack` and `expand` are predicted to be faster than the path before (`expand_from` 0: never)."""
    tuning = CpuTuning(isa)
    changes = crossovers(lambda m: str(tuning.first(problem.at(m))["path"]).replace("single", "registers"))
    unpack = next((m for m, path in changes if path != "registers"), _NEVER)
    expand = next((m for m, path in changes if path == "expand"), 0)
    return {"threads": 0, "unpack_from": max(1, unpack), "expand_from": expand}


def arguments(problem: Problem, config: Config | None, isa: str) -> dict[str, int]:
    """What the op takes besides its operands. Without a configuration the thresholds, for any number of rows."""
    found = dict(thresholds(problem, isa)) if config is None else _arguments(config)
    if problem.act == "a8":
        del found["expand_from"]
    return found


def _arguments(config: Mapping[str, int | str]) -> dict[str, int]:
    path, fields = config["path"], {name: int(value) for name, value in config.items() if name != "path"}
    return fields | {"unpack_from": 1 if path == "unpack" else _NEVER, "expand_from": 1 if path == "expand" else 0}
