"""Cost of the CPU kernels that skip channels (skip.cpp, skip_codes_input.cpp, skip_codes_output.cpp), one model per instruction set and kind of weight.

    T = max(bytes / bandwidth(t), instructions / (issue t)) + lists + call + wake [t > 1],    bandwidth(t) = min(t single, bandwidth)

Up to four rows read the union of their channels: a share of 1 - (1 - density)^M where masks are independent. More rows than the limit, or
than four, are PyTorch's own product, of expanded weights where they are codes. Lists of channels are made by one thread.

Instructions of fp weights: per 4 channels and 32 outputs 4 loads, 4 prefetches and 8 widenings, and per row 8 multiply-adds and 4 moves of
sums. Of codes the counts are fitted to measurements: see `_model`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import sympy
import torch

from effllm.autotune.cost import ACT, BANDWIDTH, CALL, GROUP, META, OUT, K, M, Model, N, values_of
from effllm.kernels.cpu.cost import ISSUE, PRODUCT, SINGLE, THREADS, WAKE
from effllm.lowering.op import Problem
from effllm.runtime.layouts.input_major import width_of

DENSITY, RANK = sympy.symbols("density rank", nonnegative=True)
LISTED = sympy.Symbol("listed", positive=True)  # channels that are compared with thresholds
VALUE, STORED = sympy.symbols("value stored", positive=True)  # bytes of a weight; bits of a stored code
DIGITS = sympy.Symbol("digits16", positive=True)  # int16 digits of an activation
ROWS = 4  # that share a list
KINDS = ("values", "codes", "products")

_WIDTH = {"avx512": 1.0, "avx2": 2.0, "portable": 5.0}  # instructions per operation on 64 bytes
# as above for codes. On AVX2 so that half of the channels counts as a loss (0.9), as it was in whole steps: about 0.66 there, where dense siblings are
# one call and bound by arithmetic; kernels alone, of one large matrix in slow memory, reached 1.04 to 1.36
_CODES = _WIDTH | {"avx2": 4.2}
_LIST = {"avx512": 1.5, "avx2": 8.0, "portable": 8.0}  # instructions per channel and row


@functools.cache
def models(isa: str) -> Mapping[str, Model]:
    """Kind -> model of an instruction set's kernels."""
    return {kind: _model(kind, isa) for kind in KINDS}


def _model(kind: str, isa: str) -> Model:
    width = _WIDTH[isa]
    share = 1 - (1 - DENSITY) ** M
    outside = M * (K * ACT + N * OUT)
    coded = N * K * STORED / 8
    scales = sympy.Piecewise((N * K / GROUP * META, STORED < 16), (0, True))
    rate = sympy.Min(THREADS * SINGLE, BANDWIDTH)
    woken = sympy.Piecewise((0, THREADS <= 1), (WAKE, True))
    lists = _LIST[isa] * LISTED * M
    if kind == "products":
        nbytes = coded + scales + outside
        expand = sympy.Piecewise((N * K * 8 / (ISSUE * THREADS) + 2 * N * K * OUT / rate, STORED < 16), (0, True))
        products = sympy.Max(nbytes / rate, M * N * K / (0.94 * PRODUCT * THREADS))
        seconds = products + expand + 3 * CALL + woken
        return Model(nbytes, 2 * M * N * K, N * K * 8, seconds, sympy.Max(nbytes / BANDWIDTH, M * N * K / (PRODUCT * THREADS)))
    low = RANK * (N + K)
    if kind == "values":
        nbytes = (N * K * share + low) * VALUE + outside
        instructions = width * (N * K * share * (16 + 12 * M) / 128 + low * (3 + 2.6 * M) / 32) + lists
        flops = 2 * M * (N * K * DENSITY + low)
    else:
        nbytes = coded * share + scales + outside
        codes = N * K * share
        # fitted to the times beside dense ones of 4096x11008 (inputs) and 11008x4096 (outputs), groups of 32, in memory, and of
        # 4096x300 and 800x4096 in cache: stalls on lines that are not there yet count as instructions
        instructions = _CODES[isa] * DIGITS * (0.033 * codes * (1 + M) + M * 1.45 * N * K / sympy.Min(GROUP, 128)) + lists * 4
        flops = 2 * M * N * K * DENSITY
    seconds = sympy.Max(nbytes / rate, instructions / (ISSUE * THREADS)) + lists / ISSUE + CALL + woken
    return Model(nbytes, flops, instructions, seconds, nbytes / BANDWIDTH)


def kind_of(problem: Problem) -> str:
    """The kernel that runs a problem: dynamic rows count as one."""
    m, limit = problem.m or 1, int(dict(problem.detail).get("limit", ROWS))
    if m > ROWS or 0 <= limit < m:
        return "products"
    return "codes" if problem.bits else "values"


def values(problem: Problem, machine: Mapping[str, float], threads: int) -> dict[str, float]:
    """The models' symbols for a problem on a machine."""
    about = dict(problem.detail)
    found = {"density": 0.5, "rank": 0.0} | values_of(problem) | dict(machine) | {"threads": float(threads)}
    value = float(about.get("value_bytes", 2))
    found |= {"value": value, "stored": float(width_of(problem.bits)) if problem.bits else 8 * value}
    found["digits16"] = 2.0 if problem.dtype == torch.float32 else 1.0
    found["listed"] = float(problem.n if problem.op.startswith("sparse_up") else problem.k)
    if problem.dtype != torch.bfloat16:
        found["product"] = machine["product32"]
    return found
