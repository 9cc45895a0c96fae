"""CPU providers of the ops of activation sparsity: any build, weights in floating point or codes of 1 to 8 bits, 4 or 8 wide.

A configuration is {"threads": t, "block": outputs}: threads 0 for as many as the work is worth, block the outputs (of kernels that skip
outputs: rows) of one task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effllm.autotune import machines
from effllm.autotune.cost import Prediction
from effllm.kernels.cpu import build, skip_cost
from effllm.kernels.cpu.build import Isa
from effllm.lowering.op import OPS, YES, Config, Problem, Provider, Verdict
from effllm.runtime.formats import bipolar

# op -> the kernels' own op, the layout it reads, its blocks, the default first
OPERATIONS: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "sparse_linear": ("skip_input", "dense", (2048, 512, 4096)),
    "rsparse_linear": ("skip_rest", "dense", (2048, 512, 4096)),
    "sparse_up_linear": ("skip_output", "dense", (64, 16)),
    "sparse_bipolar_linear": ("skip_input_codes", "input_major", (2048, 512, 4096)),
    "sparse_up_bipolar_linear": ("skip_output_codes", "row_major", (128, 32)),
}
WHOLE = {("sparse_bipolar_linear", "avx2"): 4096}  # where threads share channels and not outputs: a channel's codes are read in one go
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_VALUES = {"float32", "bfloat16", "float16"}


def skip_input(x, threshold, weight_t, bias, limit, threads=0, block=0, ahead=0):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], weight_t.shape[1])


def skip_rest(x, threshold, colnorm, weight_t, u, v, bias, limit, threads=0, block=0, ahead=0):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], weight_t.shape[1])


def skip_output(x, gate, threshold, weight, bias, limit, threads=0, block=0, ahead=0):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def skip_input_codes(x, threshold, codes, scale, minimum, bias, n, bits, group, zero, limit, threads=0, block=0):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], n)


def skip_output_codes(x, gate, threshold, codes, scale, minimum, bias, bits, group, zero, limit, threads=0, block=0):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], codes.shape[0])


FAKES: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (skip_input, skip_rest, skip_output, skip_input_codes, skip_output_codes)}


def supports(problem: Problem, isa: Isa) -> Verdict:
    """Whether this machine and this problem fit the build."""
    lacking = build.missing(isa)
    if lacking:
        return Verdict(False, f"processor lacks {', '.join(lacking)}")
    if problem.dtype not in _FLOATS:
        return Verdict(False, f"activations are {problem.dtype}, not float32, bfloat16 or float16")
    if not problem.bits and dict(problem.detail).get("values") not in _VALUES:
        return Verdict(False, f"weights are {dict(problem.detail).get('values')}, not float32, bfloat16 or float16")
    if problem.bits and problem.group not in (bipolar.CHANNEL, *bipolar.GROUPS):
        return Verdict(False, f"groups of {problem.group}, the kernels read {bipolar.GROUPS} or whole channels")
    return YES


@dataclass(frozen=True)
class SkipTuning:
    """The configurations of one build's kernels that skip channels (a lowering.op.Tuning)."""

    isa: str

    def configs(self, problem: Problem) -> Iterator[Config]:
        """Every legal configuration of a problem."""
        for block in OPERATIONS[problem.op][2]:
            for threads in sorted({0, 1, torch.get_num_threads()}):
                yield {"threads": threads, "block": block}

    def legal(self, problem: Problem, config: Config) -> Verdict:
        """Whether a configuration can run here."""
        threads, blocks, most = config.get("threads"), OPERATIONS[problem.op][2], torch.get_num_threads()
        if set(config) != {"threads", "block"} or type(threads) is not int or not 0 <= threads <= most or config["block"] not in blocks:
            return Verdict(False, f"{dict(config)} is no configuration of {problem.op} with {most} threads and blocks of {blocks}")
        return YES

    def predict(self, problem: Problem, config: Config) -> Prediction:
        """The model's figures of a configuration. Automatic threads count as one or all, whichever is faster."""
        model, machine = skip_cost.models(self.isa)[skip_cost.kind_of(problem)], machines.cpu()
        counts = [config["threads"]] if config["threads"] else [1, torch.get_num_threads()]
        return min((model.evaluate(skip_cost.values(problem, machine, t)) for t in counts), key=lambda p: p.seconds)

    def first(self, problem: Problem) -> Config:
        """Threads by the kernel, the default block."""
        return {"threads": 0, "block": WHOLE.get((problem.op, self.isa), OPERATIONS[problem.op][2][0])}


def _provider(op: str, isa: Isa, rank: int, ensure: Callable[[Isa], None]) -> Provider:
    own, layout, _ = OPERATIONS[op]

    def call(*args: Any, problem: Problem, config: Config | None = None) -> Tensor:
        ensure(isa)
        found = getattr(getattr(torch.ops, isa.namespace), own)
        y: Tensor = found(*args, **(config or SkipTuning(isa.name).first(problem)))
        return y

    return Provider(f"cpu-{isa.name}", op, "cpu", layout, lambda p: supports(p, isa), call, SkipTuning(isa.name), lambda: ensure(isa), rank=rank)


def register(isa: Isa, rank: int, ensure: Callable[[Isa], None]) -> None:
    """Add the providers of an instruction set; `ensure` builds and loads it on first use."""
    for op in OPERATIONS:
        OPS[op].register(_provider(op, isa, rank, ensure))
