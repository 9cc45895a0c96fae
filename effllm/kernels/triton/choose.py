"""Which kernel and which tile sizes for a problem: every legal configuration is priced, the cheapest wins.

The price of a configuration is

    T = max(t_memory, t_issue, t_mma) * tail + launches * t_launch

    t_memory = bytes / (bandwidth * u),  u = min(1, bytes in flight per multiprocessor / (bandwidth * latency / multiprocessors))   Little's law
    t_issue  = instructions / issue rate, from the counts per weight in the kernels' headers
    tail     = ceil(waves) / waves,      waves = programs / (multiprocessors * programs resident on one)

A measured configuration in TUNED (benchmarks/gpu.py prints them) is taken as it is. Nothing here needs a GPU or Triton.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from effllm.kernels.triton.machine import Machine


@dataclass(frozen=True)
class Shape:
    """A linear: M rows, N outputs, K inputs; `act` bytes of an activation element (1: int8, 4: fp32), `out` bytes of an output element."""

    m: int
    n: int
    k: int
    bits: int
    group: int
    affine: bool
    act: int = 2
    out: int = 2

    @property
    def weight_bytes(self) -> float:
        """Codes and fp16 scales."""
        per_group = (4 if self.affine else 2) / self.group if self.group else 0.0
        return self.n * self.k * (self.bits / 8 + per_group)


@dataclass(frozen=True)
class Config:
    """One way to run a linear. `bm` is the rows of a tile (GEMV: 1, 2 or 4); kind "dense" unpacks and calls the vendor's product."""

    kind: str
    bm: int = 1
    bn: int = 64
    bk: int = 64
    split: int = 1
    warps: int = 4
    stages: int = 1


# (capability class, M, N, K, bits, group, act) -> configuration measured best there. Empty until a GPU has been at hand.
TUNED: dict[tuple[str, int, int, int, int, int, int], Config] = {}

_GEMV_ROWS = 4  # one accumulator tile per row: past this registers run out
# Instructions per weight of gemv.py's inner loop, by part, for one row of 16-bit activations, and of each further row: read from
# the machine code for cuda:90 (tests/kernels/triton/test_aot.py compares).
_GEMV_ISSUE: dict[int, float] = {8: 5.2, 4: 3.9, 2: 3.3, 1: 2.95}
_GEMV_ROW, _GEMV_WIDE = 1.95, 0.4
_REGISTERS = 65536  # per multiprocessor
_SPLITS = (1, 2, 4, 8, 16, 32)


def parts(bits: int) -> list[int]:
    """The parts of a code, most significant first: the binary digits of its width."""
    return [p for p in (8, 4, 2, 1) if bits & p]


def _splits(shape: Shape, bk: int) -> Iterator[int]:
    tiles = max(1, -(-shape.k // bk))
    yield from (s for s in _SPLITS if s == 1 or s * 2 <= tiles)


def candidates(shape: Shape) -> Iterator[Config]:
    """Every configuration that fits registers and shared memory on all supported chips."""
    # four rows of a part with 16 or 32 fields a word unroll into ten seconds of compilation
    if shape.m <= (_GEMV_ROWS if parts(shape.bits)[-1] >= 4 else _GEMV_ROWS // 2):
        mb, widest = 1 << (shape.m - 1).bit_length(), parts(shape.bits)[0]
        for bn in (32, 64, 128, 256):
            for bk in (64, 128, 256, 512, 1024):
                rows = bk * widest // 32
                for warps in (1, 2, 4, 8):
                    words = rows * bn / (32 * warps)
                    # at least one 128-bit load per thread; about 4 registers a word and row (128 at most)
                    if words >= 4 and words * mb <= 16:
                        for split in _splits(shape, bk):
                            for stages in (1, 2, 3):
                                yield Config("gemv", mb, bn, bk, split, warps, stages)
    if shape.act != 4:
        # at most two groups a tile: each has a product of its own over the whole tile
        bks = [bk for bk in (32, 64, 128) if not shape.group or shape.group % bk == 0 or bk == 2 * shape.group]
        for bm in (16, 32, 64, 128):
            if bm == 16 or bm // 2 < shape.m:
                for bn in (32, 64, 128):
                    if bm * bn <= 64 * 128:
                        for bk in bks:
                            for split in _splits(shape, bk) if shape.m <= 128 else (1,):
                                for stages in (2, 3):
                                    yield Config("gemm", bm, bn, bk, split, 4 if bm * bn <= 64 * 64 else 8, stages)
    else:
        bk = min(32, shape.group or 32) if shape.group != 16 else 32
        for bm, bn in ((16, 32), (32, 32), (32, 64)):
            yield Config("gemm", bm, bn, bk, 1, 4, 1)
    if shape.act != 1:
        yield Config("dense", bn=64, bk=64)


def instructions(shape: Shape, config: Config) -> float:
    """Thread instructions of a whole call, from the counts per weight in the kernels' headers."""
    weights = shape.n * shape.k
    if config.kind == "gemv":
        wide = _GEMV_WIDE if shape.act == 4 else 0.0
        per_weight = sum(_GEMV_ISSUE[p] + wide + _GEMV_ROW * (config.bm - 1) for p in parts(shape.bits))
        return weights * per_weight * -(-shape.m // config.bm)
    if config.kind == "gemm":
        # unpack in pairs, combine parts, through shared memory
        per_weight = 2.0 * len(parts(shape.bits)) + (1.5 if len(parts(shape.bits)) > 1 else 0.0) + 1.0
        return weights * per_weight * -(-shape.m // config.bm)
    return weights * (2.0 * len(parts(shape.bits)) + 3.0)


def seconds(shape: Shape, config: Config, machine: Machine) -> float:
    """Predicted time of one call with a cold cache, inside a CUDA graph."""
    m, n, k = shape.m, shape.n, shape.k
    flops = 2.0 * m * n * k
    if config.kind == "dense":
        mma = machine.mma16 if shape.act == 2 else machine.sms * 128 * 2 * machine.clock
        unpack = max((shape.weight_bytes + n * k * shape.act) / machine.bandwidth, instructions(shape, config) / machine.issue)
        near = n * k * shape.act <= machine.l2 / 2
        product = max((n * k * shape.act * (0.3 if near else 1.0) + m * (k + n) * shape.act) / machine.bandwidth, flops / (0.7 * mma))
        return unpack + product + 2 * machine.launch
    programs = -(-m // config.bm) * -(-n // config.bn) * config.split
    tile = config.bk * config.bn * shape.bits / 8
    threads = config.warps * 32
    held = 32 + (2.5 * config.bm * config.bk * parts(shape.bits)[0] / 32 * config.bn if config.kind == "gemv" else 2.0 * config.bm * config.bn) / threads
    resident = max(1, min(64 // config.warps, int(_REGISTERS / (min(held, 255) * threads))))
    if config.kind == "gemm":
        shared = config.stages * (tile + config.bm * config.bk * shape.act) + config.bk * config.bn * shape.act
        resident = max(1, min(resident, int(machine.smem // max(shared, 1))))
    here = min(resident, math.ceil(programs / machine.sms))
    need = machine.bandwidth * machine.latency / machine.sms
    used = min(1.0, here * max(config.stages, 1) * tile / need)
    traffic = shape.weight_bytes + m * k * shape.act + m * n * (shape.out if config.split == 1 else 8 * config.split + shape.out)
    # re-reads by other row blocks come from L2, at about three times the memory's rate
    traffic += shape.weight_bytes * (-(-m // config.bm) - 1) / 3
    mma = 0.0
    if config.kind == "gemm":
        rate = {1: machine.mma8, 2: machine.mma16}.get(shape.act, machine.sms * 128 * 2 * machine.clock)
        repeats = config.bk // shape.group if 0 < shape.group < config.bk else 1
        mma = 2.0 * max(m, config.bm) * n * k * repeats / (0.5 * rate)
    waves = programs / (machine.sms * resident)
    tail = math.ceil(waves) / waves if waves > 1 else 1.0
    idle = max(1.0, machine.sms / programs)  # too few programs leave multiprocessors without work
    busy = max(traffic / (machine.bandwidth * used), instructions(shape, config) / machine.issue * idle, mma * idle)
    return busy * tail + machine.launch * (1 if config.split == 1 else 2)


def ranked(shape: Shape, machine: Machine) -> list[tuple[float, Config]]:
    """All candidates, cheapest first; equal prices in the order of `candidates`."""
    return sorted(((seconds(shape, c, machine), c) for c in candidates(shape)), key=lambda pair: pair[0])


@functools.lru_cache(maxsize=4096)
def choose(shape: Shape, machine: Machine, target: str = "") -> Config:
    """The configuration to run: measured where TUNED has it, else the cheapest by the model."""
    found = TUNED.get((target, shape.m, shape.n, shape.k, shape.bits, shape.group, shape.act))
    return found or ranked(shape, machine)[0][1]
