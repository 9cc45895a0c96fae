"""Configurations of the Triton Monarch kernels, their cost, and the cheapest one.

    T = max(bytes / (bandwidth u), flops / rate) + launches call + barrier,    u as in cost.py

Figures are the model's: the kernels compile for every target and pass in the interpreter; the constants wait for measurements.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import sympy
import torch
from sympy import Max, Min, Piecewise, ceiling

from effllm.autotune import gpus, machines
from effllm.autotune.cost import ACT, BANDWIDTH, CALL, OUT, K, M, Model, N, Prediction, values_of
from effllm.kernels.triton.cost import BK, BM, BN, LATENCY, MMA16, MMA32, SMS, STAGES
from effllm.lowering.op import YES, Config, Problem, Verdict

KINDS = ("fused", "pair", "gemm")
ROWS = 4  # of the GEMV kernels
_GEMV = {"bn": (4, 8, 16), "bk": (128, 256, 512, 1024), "warps": (4, 8), "stages": (1, 2, 3), "each": (1, 2, 4)}
_GEMM = {"bm": (16, 32, 64, 128), "bn": (32, 64, 128), "bk": (32, 64), "stages": (2, 3)}
_WIDE = ((16, 32), (32, 32), (32, 64))  # rows and columns of a tile with fp32 activations
_REGISTERS = 65536  # of a multiprocessor
_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}

I, O, T, VALUE, EACH = sympy.symbols("blocks_in blocks_out rank value each", positive=True)


@dataclass(frozen=True)
class MonarchTiles:
    """`bm` is the rows of a tile (GEMV: 1, 2 or 4); `each` the programs of a multiprocessor in the single launch, 1 elsewhere."""

    kind: str
    bm: int = 1
    bn: int = 8
    bk: int = 512
    warps: int = 4
    stages: int = 2
    each: int = 1

    def config(self) -> dict[str, Any]:
        """As stores and tuners hold it."""
        return asdict(self)


_NAMES = {f.name for f in fields(MonarchTiles)}


@functools.cache
def models() -> Mapping[str, Model]:
    """Kind -> model."""
    s, p = ceiling(N / O), ceiling(K / I)
    values = I * O * T * (s + p)
    middle = M * I * O * T
    bound = Max(values * VALUE / BANDWIDTH, 2 * M * values / Piecewise((MMA16, sympy.Eq(ACT, 2)), (MMA32, True)))
    found = {}
    for kind in KINDS:
        nbytes = values * VALUE + M * (K * ACT + N * OUT) + 2 * middle * (ACT if kind == "gemm" else 4)
        if kind == "gemm":
            programs = Min(ceiling(M / BM) * I * ceiling(O * T / BN), ceiling(M / BM) * O * ceiling(s / BN))
            flight = Max(STAGES - 1, 1) * (BM + BN) * BK * ACT
            rate = Piecewise((0.5 * MMA16, sympy.Eq(ACT, 2)), (0.5 * MMA32, True))
            work = 2 * Max(M, BM) * values / rate * Max(1, SMS / programs)
            extra = 2 * CALL
        else:
            programs = Min(I * ceiling(O * T / BN), O * ceiling(s / BN))
            flight = Max(STAGES, 1) * BN * BK * VALUE * (EACH if kind == "fused" else Min(4, Max(1, programs / SMS)))
            work = values * (2 + 2 * BM) * ceiling(M / BM) / (MMA32 / 2)
            # the barrier: an atomic and a poll, each a round trip to L2 of about half a memory read
            extra = CALL + LATENCY if kind == "fused" else 2 * CALL
        used = Min(1, flight * Min(1, programs / SMS) * SMS / (BANDWIDTH * LATENCY))
        seconds = Max(nbytes / (BANDWIDTH * used), work) + extra
        found[kind] = Model(nbytes, 2 * M * values, values * M, seconds, bound)
    return found


def held(tiles: MonarchTiles) -> int:
    """Registers of a thread of the GEMV kernels, an upper estimate: weights on their way twice, an accumulator a row, and addresses."""
    values = tiles.bn * tiles.bk // (32 * tiles.warps)
    return min(255, 56 + values * (2 + tiles.bm))


def resident(tiles: MonarchTiles) -> bool:
    """Whether all programs of the single launch fit a multiprocessor at once, as its barrier needs."""
    return tiles.each * tiles.warps * 32 * held(tiles) <= _REGISTERS


@dataclass(frozen=True)
class MonarchTritonTuning:
    """The configurations of the Monarch kernels (a lowering.op.Tuning). `target` names a class of gpus.CLASSES to predict for."""

    target: str = ""

    def machine(self, problem: Problem) -> dict[str, float]:
        """Constants of the machine to predict for."""
        return gpus.constants(gpus.by_class(self.target)) if self.target else machines.gpu(problem.device)

    def configs(self, problem: Problem) -> Iterator[Config]:
        """Every legal configuration of a problem; dynamic rows count as one."""
        return (tiles.config() for tiles in candidates(problem))

    def legal(self, problem: Problem, config: Config) -> Verdict:
        """Whether a configuration can run a problem."""
        if set(config) != _NAMES or config["kind"] not in KINDS:
            return Verdict(False, f"{dict(config)} is no configuration of the Monarch kernels")
        if MonarchTiles(**config) not in set(candidates(problem)):
            return Verdict(False, f"{dict(config)} does not fit {problem.m} rows of {problem.dtype}")
        return YES

    def predict(self, problem: Problem, config: Config) -> Prediction:
        """The model's figures, with a cold cache and inside a CUDA graph."""
        symbols = values_of(problem) | self.machine(problem) | {name: v for name, v in config.items() if name != "kind"}
        return models()[str(config["kind"])].evaluate(symbols | {"value": _SIZE.get(str(dict(problem.detail).get("values")), 2)})

    def first(self, problem: Problem) -> Config:
        """The model's choice."""
        return min(self.configs(problem), key=lambda c: self.predict(problem, c).seconds)


def candidates(problem: Problem) -> Iterator[MonarchTiles]:
    """Every configuration that may run a problem."""
    m = max(1, problem.m or 1)
    if m <= ROWS:
        rows = 1 << (m - 1).bit_length()
        for bn in _GEMV["bn"]:
            for bk in _GEMV["bk"]:
                for warps in _GEMV["warps"]:
                    values = bn * bk // (32 * warps)  # of a thread; accumulators take as many registers for each row
                    if 8 <= values <= 32 and values * rows <= 64:
                        for stages in _GEMV["stages"]:
                            yield MonarchTiles("pair", rows, bn, bk, warps, stages)
                            for each in _GEMV["each"]:
                                tiles = MonarchTiles("fused", rows, bn, bk, warps, stages, each)
                                if resident(tiles):
                                    yield tiles
    if problem.dtype == torch.float32:
        for bm, bn in _WIDE:
            yield MonarchTiles("gemm", bm, bn, 32, 4, 1)
        return
    for bm in _GEMM["bm"]:
        if bm > 16 and bm // 2 >= m:
            continue
        for bn in _GEMM["bn"]:
            for bk in _GEMM["bk"]:
                for stages in _GEMM["stages"]:
                    yield MonarchTiles("gemm", bm, bn, bk, 4 if bm * bn <= 64 * 64 else 8, stages)
