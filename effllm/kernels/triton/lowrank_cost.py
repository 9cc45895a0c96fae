"""Cost of the low-rank Triton kernels, and the model's choice among them.

    fused   T = bytes / bandwidth + instructions / issue + call + barrier        one launch
    apart   T = bytes / bandwidth + instructions / issue + 2 call                two launches
    dot     T = max(bytes / bandwidth, 2 M weights / mma) + 2 S call             two products on the matrix cores for each of S siblings

A problem does not say how many siblings it is made of: S = N R / values of the second factors, which is exact for equal ones and weighs a
small one beside a large one less. Bipolar factors run as two bipolar linears each, by the models of these (cost.py).

The barrier costs two round trips to L2. Few rows cost a conversion and a load for each weight and a multiply-add for each of its rows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import sympy
import torch

from effllm.autotune import machines
from effllm.autotune.cost import ACT, BANDWIDTH, CALL, OUT, K, M, Model, N, Prediction, values_of
from effllm.kernels.triton.choose import TritonTuning
from effllm.lowering.lowrank_bipolar_linear import stages
from effllm.lowering.op import YES, Config, Problem, Verdict

KINDS = ("fused", "apart", "dot")
RANK, SECOND = sympy.symbols("rank second", nonnegative=True)  # SECOND: values of A
VALUE, SMS, CLOCK, LATENCY, MMA = sympy.symbols("value sms clock latency mma", positive=True)
SIBLINGS = sympy.Symbol("siblings", positive=True)
_LANES = 128  # instructions a multiprocessor issues a clock, in threads


@functools.cache
def models() -> Mapping[str, Model]:
    """Kind -> model."""
    weights = RANK * K + SECOND
    nbytes = weights * VALUE + M * (K * ACT + N * OUT)
    flops = 2 * M * weights
    instructions = weights * (1.5 * sympy.ceiling(M / 4) + 1.3 * M)
    few = sympy.Max(nbytes / BANDWIDTH, instructions / (SMS * CLOCK * _LANES))
    many = sympy.Max((nbytes + 2 * M * RANK * ACT) / BANDWIDTH, 2 * sympy.ceiling(M / 16) * 16 * weights / MMA)
    seconds = {"fused": few + CALL + 2 * LATENCY, "apart": few + 2 * CALL, "dot": many + 2 * SIBLINGS * CALL}
    return {kind: Model(nbytes, flops, instructions, seconds[kind], nbytes / BANDWIDTH) for kind in KINDS}


def siblings(problem: Problem) -> float:
    """Low-rank weights of a problem, at least one; of unequal ones the number of equal ones with as many values."""
    d = dict(problem.detail)
    rank = int(d["rank"])
    rows = problem.n - rank if d.get("pivoted") else problem.n
    return max(1.0, rows * rank / max(1, int(d["second"]))) if problem.op.endswith("_many") else 1.0


@dataclass(frozen=True)
class LowrankTritonTuning:
    """The ways to run a low-rank linear on a GPU (a lowering.op.Tuning): {"kind": ...}."""

    def configs(self, problem: Problem) -> Iterator[Config]:
        """Every legal configuration of a problem."""
        for kind in KINDS:
            yield {"kind": kind}

    def legal(self, problem: Problem, config: Config) -> Verdict:
        """Whether a configuration can run."""
        return YES if config.get("kind") in KINDS else Verdict(False, f"{dict(config)} is no configuration of the low-rank kernels")

    def predict(self, problem: Problem, config: Config) -> Prediction:
        """The model's figures of a configuration."""
        machine = machines.gpu(problem.device)
        wide = problem.dtype == torch.float32
        value = 4.0 if str(dict(problem.detail).get("factor", "bfloat16")) == "float32" else 2.0
        more: dict[str, float] = {"siblings": siblings(problem), "value": value, "mma": machine["mma32" if wide else "mma16"]}
        return models()[str(config["kind"])].evaluate(values_of(problem) | machine | more)

    def first(self, problem: Problem) -> Config:
        """The model's choice."""
        return min(self.configs(problem), key=lambda c: self.predict(problem, c).seconds)


@dataclass(frozen=True)
class LowrankBipolarTritonTuning:
    """One way: each stage runs as the bipolar linear that it is, with what the tuner knows of that (a lowering.op.Tuning)."""

    def configs(self, problem: Problem) -> Iterator[Config]:
        """The one configuration."""
        yield {"kind": "stages"}

    def legal(self, problem: Problem, config: Config) -> Verdict:
        """Whether it is that."""
        return YES if dict(config) == {"kind": "stages"} else Verdict(False, f"{dict(config)} is no configuration: the stages have their own")

    def predict(self, problem: Problem, config: Config) -> Prediction:
        """Both stages as the model would run them, with the calls of the other siblings, and one more that puts pivoted rows in their places."""
        tuning = TritonTuning()
        both = [tuning.predict(stage, tuning.first(stage)) for stage in stages(problem)]
        total = [sum(getattr(p, name) for p in both) for name in ("nbytes", "flops", "instructions", "seconds", "bound")]
        machine = machines.gpu(problem.device)
        calls = 2 * (siblings(problem) - 1)
        if dict(problem.detail).get("pivoted"):
            moved = (problem.m or 1) * problem.n * 2 * problem.dtype.itemsize
            total[0] += moved
            total[3] += moved / machine["bandwidth"]
            calls += 1
        total[3] += calls * machine["call"]
        return Prediction(*total)

    def first(self, problem: Problem) -> Config:
        """The one configuration."""
        return {"kind": "stages"}
