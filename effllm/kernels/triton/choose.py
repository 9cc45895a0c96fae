"""Which kernel and which tile sizes for a problem: what the tuning store holds, else the cheapest of all configurations by cost.py.

Nothing here needs a GPU; without one the model's figures are those of gpus.DEFAULT.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from effllm.autotune import cost as model
from effllm.autotune import gpus, machines, use
from effllm.autotune.cost import Prediction
from effllm.kernels.triton import cost, space
from effllm.kernels.triton.config import Tiles
from effllm.lowering.bipolar_linear import provider
from effllm.lowering.op import Config, Problem, Verdict


@dataclass(frozen=True)
class TritonTuning:
    """The configurations of the linear kernels (a lowering.op.Tuning).

    `target` names a class of gpus.CLASSES to predict for; the default is the GPU that the problem's device names.
    """

    target: str = ""

    def machine(self, problem: Problem) -> dict[str, float]:
        """Constants of the machine to predict for."""
        return gpus.constants(gpus.by_class(self.target)) if self.target else machines.gpu(problem.device)

    def configs(self, problem: Problem) -> Iterator[Config]:
        """Every legal configuration of a problem; dynamic rows count as one."""
        return (tiles.config() for tiles in space.candidates(problem, self.machine(problem)))

    def legal(self, problem: Problem, config: Config) -> Verdict:
        """Whether a configuration can run here, and covers the problem's rows without waste."""
        why = space.refusal(problem, config, self.machine(problem))
        return Verdict(not why, why)

    def predict(self, problem: Problem, config: Config) -> Prediction:
        """The model's figures, with a cold cache and inside a CUDA graph."""
        kind = str(config["kind"])
        sizes = {name: value for name, value in config.items() if name != "kind"}
        return cost.models()[kind].evaluate(cost.values(problem, self.machine(problem)) | sizes)

    def first(self, problem: Problem) -> Config:
        """The model's choice."""
        return _cheapest(problem, tuple(self.machine(problem).items())).config()

    def ranked(self, problem: Problem) -> list[tuple[float, Tiles]]:
        """All configurations with their predicted seconds, cheapest first; equal ones in the order of `configs`."""
        return _ranked(problem, self.machine(problem))

    def crossovers(self, problem: Problem, limit: int = 4096) -> list[tuple[int, str]]:
        """Rows at which another path becomes the cheapest, as (first m, "gemv" | "split-K" | "gemm" | "dense"), solved from the model."""

        def path(m: int) -> str:
            best = self.ranked(problem.at(m))[0][1]
            return "split-K" if best.kind == "gemm" and best.split > 1 else best.kind

        return model.crossovers(path, limit)


def _ranked(problem: Problem, machine: Mapping[str, float]) -> list[tuple[float, Tiles]]:
    values = cost.values(problem, machine)
    found = [(cost.models()[tiles.kind].time(values | vars(tiles)), tiles) for tiles in space.candidates(problem, machine)]
    return sorted(found, key=lambda pair: pair[0])


@functools.lru_cache(maxsize=4096)
def _cheapest(problem: Problem, machine: tuple[tuple[str, float], ...]) -> Tiles:
    return _ranked(problem, dict(machine))[0][1]


def planned_rows(m: int) -> int:
    """Rows that the choice for m rows is made for: m up to 8, then four steps per octave, rounded up.

    A prompt of any length then finds a choice that is made already; the store's M buckets are coarser still.
    """
    step = 1 << max(0, (m - 1).bit_length() - 3)
    return -(-m // step) * step


def tiles_for(problem: Problem) -> Tiles:
    """What a call runs, on the current device: by the store, else by the model; CPU tensors (the interpreter) never reach the store."""
    planned = problem.at(planned_rows(space.rows(problem)))
    if torch.device(problem.device).type != "cuda":
        return Tiles.of(TritonTuning().first(planned))
    config = use.choose(provider(problem.op, "triton"), planned).config
    return Tiles.of(config if config is not None else TritonTuning().first(planned))
