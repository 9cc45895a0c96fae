"""Cost of the Triton kernels: one model per kind of kernel. Nothing here needs a GPU.

    T = max(t_memory, t_issue, t_mma) * tail + launches * call

    t_memory = bytes / (bandwidth * u),  u = min(1, bytes in flight per multiprocessor / (bandwidth * latency / multiprocessors))   Little's law
    t_issue  = instructions / (128 lanes * multiprocessors * clock), from the counts per weight in the kernels' headers
    tail     = ceil(waves) / waves,      waves = programs / (multiprocessors * programs resident on one)

`dense` is two such kernels after one another, the second of them the vendor's. The bound is the same for all kinds: the packed bytes at
full bandwidth, or the products at the full rate of their type.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import sympy
from sympy import Max, Min, Piecewise, ceiling, floor

from effllm.autotune.cost import ACT, BANDWIDTH, BITS, CALL, OUT, PARTS, WEIGHT_BYTES, K, M, Model, N, values_of
from effllm.lowering.op import Problem

BM, BN, BK, SPLIT, WARPS, STAGES = sympy.symbols("bm bn bk split warps stages", positive=True, integer=True)
SMS, CLOCK, LATENCY, L2, SMEM = sympy.symbols("sms clock latency l2 smem", positive=True)
MMA16, MMA8, MMA32 = sympy.symbols("mma16 mma8 mma32", positive=True)
SPAN = sympy.Symbol("span", positive=True)  # columns that share a scale, past any tile where per channel

# Instructions per weight of gemv.py's inner loop, by part, for one row of 16-bit activations, and of each further row: read from
# the machine code for cuda:90 (tests/kernels/triton/test_aot.py compares).
_GEMV_ISSUE = {8: 5.2, 4: 3.9, 2: 3.3, 1: 2.95}
_GEMV_ROW, _GEMV_WIDE = 1.95, 0.4
_REGISTERS = 65536  # per multiprocessor
_CACHED = 0.3  # of the memory's time to read what the L2 cache holds: about three times its rate
_ROUND = 1e-9  # sympy reorders divisions: a whole number must not become the next one by the last bit

_BLOCKS = ceiling(M / BM)
_TILE = BK * BN * BITS / 8  # bytes of codes
_FLOPS = 2 * M * N * K
_BOUND = Max((WEIGHT_BYTES + M * (K * ACT + N * OUT)) / BANDWIDTH, _FLOPS / Piecewise((MMA8, sympy.Eq(ACT, 1)), (MMA16, sympy.Eq(ACT, 2)), (MMA32, True)))


@functools.cache
def models() -> Mapping[str, Model]:
    """Kind -> model."""
    return {"gemv": _gemv(), "gemm": _gemm(), "dense": _dense()}


def values(problem: Problem, machine: Mapping[str, float]) -> dict[str, float]:
    """The symbols of a problem on a machine (machines.gpu); those of a configuration are its fields."""
    return {**values_of(problem), **machine, "span": problem.group or 1 << 40}


def shared_bytes(problem: Problem, bm: int, bn: int, bk: int, stages: int) -> float:
    """Shared memory of one GEMM program."""
    act = values_of(problem)["act"]
    return float(_shared(bm, bn, bk, stages, problem.bits, act))


def _shared(bm, bn, bk, stages, bits, act):  # type: ignore[no-untyped-def]
    """Stages of codes and activations, and one unpacked tile; of numbers or of expressions."""
    return stages * (bk * bn * bits / 8 + bm * bk * act) + bk * bn * act


def _has(part: int) -> sympy.Expr:
    """1 where a code has a part of this many bits, else 0."""
    return sympy.Mod(floor(BITS / part), 2)


def _resident(registers: sympy.Expr) -> sympy.Expr:
    """Programs that the registers (per thread) and the 64 warps of a multiprocessor allow."""
    return Min(floor(64 / WARPS), floor(_REGISTERS / (Min(registers, 255) * 32 * WARPS) + _ROUND))


def _model(per_weight: sympy.Expr, resident: sympy.Expr, mma: sympy.Expr) -> Model:
    """A kernel of ours: instructions per weight and row block, programs resident on a multiprocessor, seconds of matrix products."""
    programs = _BLOCKS * ceiling(N / BN) * SPLIT
    instructions = N * K * per_weight * _BLOCKS
    # re-reads by other row blocks come from L2
    traffic = WEIGHT_BYTES * (1 + (_BLOCKS - 1) / 3) + M * K * ACT + M * N * Piecewise((OUT, SPLIT <= 1), (8 * SPLIT + OUT, True))
    resident = Max(1, resident)
    here = Min(resident, ceiling(programs / SMS - _ROUND))
    used = Min(1, here * STAGES * _TILE / (BANDWIDTH * LATENCY / SMS))
    waves = programs / (SMS * resident)
    tail = ceiling(waves - _ROUND) / Max(1, waves)
    idle = Max(1, SMS / programs)  # too few programs leave multiprocessors without work
    busy = Max(traffic / (BANDWIDTH * used), instructions / (128 * SMS * CLOCK) * idle, mma * idle)
    return Model(traffic, _FLOPS, instructions, busy * tail + CALL * Piecewise((1, SPLIT <= 1), (2, True)), _BOUND)


def _gemv() -> Model:
    wide = Piecewise((_GEMV_WIDE, sympy.Eq(ACT, 4)), (0, True))
    per_weight = sum(count * _has(part) for part, count in _GEMV_ISSUE.items()) + PARTS * (wide + _GEMV_ROW * (BM - 1))
    widest = Piecewise((8, BITS >= 8), (4, BITS >= 4), (2, BITS >= 2), (1, True))
    registers = 32 + 2.5 * BM * BK * widest / 32 * BN / (32 * WARPS)
    return _model(per_weight, _resident(registers), sympy.Integer(0))


def _gemm() -> Model:
    # unpack in pairs, combine parts, through shared memory
    per_weight = 2 * PARTS + Piecewise((1.5, PARTS > 1), (0, True)) + 1
    registers = 32 + 2 * BM * BN / (32 * WARPS)
    resident = Min(_resident(registers), floor(SMEM / _shared(BM, BN, BK, STAGES, BITS, ACT) + _ROUND))
    rate = Piecewise((MMA8, sympy.Eq(ACT, 1)), (MMA16, sympy.Eq(ACT, 2)), (MMA32, True))
    repeats = Max(1, floor(BK / SPAN))  # every group of a tile has a product of its own over the whole tile
    return _model(per_weight, resident, 2 * Max(M, BM) * N * K * repeats / (0.5 * rate))


def _dense() -> Model:
    weight = N * K * ACT
    instructions = N * K * (2 * PARTS + 3)
    unpack = Max((WEIGHT_BYTES + weight) / BANDWIDTH, instructions / (128 * SMS * CLOCK))
    read = weight * Piecewise((_CACHED, weight <= L2 / 2), (1, True)) + M * (K + N) * ACT
    product = Max(read / BANDWIDTH, _FLOPS / (0.7 * Piecewise((MMA16, sympy.Eq(ACT, 2)), (MMA32, True))))
    return Model(WEIGHT_BYTES + 2 * weight + M * (K + N) * ACT, _FLOPS, instructions, unpack + product + 2 * CALL, _BOUND)
