"""Cost of the CPU Monarch kernels (monarch.cpp), one model per instruction set, kind of factors and path.

    T = max(bytes / bandwidth(t), instructions / (issue t)) + call + phases + wake [t > 1],    bandwidth(t) = min(t single, bandwidth)

    gemv     both stages in one region: per 32 values two widenings, and two multiply-adds a token
    matmul   I + O products of PyTorch's own and two copies
    codes    bipolar factors through the kernels of bipolar.h: per 64 codes the extraction and one product a token and digit
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import sympy

from effllm.autotune.cost import ACT, BANDWIDTH, BITS, CALL, DIGITS, GROUP, META, OUT, PARTS, K, M, Model, N
from effllm.kernels.cpu.cost import ISSUE, SINGLE, THREADS, WAKE

BLOCKS_IN, BLOCKS_OUT, RANK = sympy.symbols("blocks_in blocks_out rank", positive=True, integer=True)
VALUE = sympy.Symbol("value", positive=True)  # bytes of a value of a dense factor
PRODUCT = sympy.Symbol("gemm", positive=True)  # multiply-adds a second of one thread in PyTorch's product of the activations' dtype
PATHS = ("gemv", "matmul")

ROWS = sympy.ceiling(N / BLOCKS_OUT)
COLUMNS = sympy.ceiling(K / BLOCKS_IN)
VALUES = BLOCKS_IN * BLOCKS_OUT * RANK * (ROWS + COLUMNS)

_WIDTH = {"avx512": 1.0, "avx2": 2.0, "portable": 4.0}  # instructions per operation on 16 floats
_DOT = {"avx512": 1.0, "avx2": 6.0, "portable": 24.0}  # of one 16-row x 4-column product of codes
_PHASE = 1.5e-6  # s from one phase to the next, in one region


@functools.cache
def models(isa: str) -> Mapping[str, Model]:
    """Path -> model of an instruction set."""
    return {"gemv": _gemv(isa), "matmul": _matmul(), "codes": _codes(isa)}


def _activations() -> sympy.Expr:
    return M * (K * ACT + N * OUT)


def _gemv(isa: str) -> Model:
    nbytes = VALUES * VALUE + _activations()
    middle = M * (K + BLOCKS_IN * BLOCKS_OUT * RANK + N)  # activations placed, sums scattered, outputs rounded
    instructions = VALUES / 32 * (2 + 2 * M) * _WIDTH[isa] + 2 * middle
    rate = sympy.Min(THREADS * SINGLE, BANDWIDTH)
    seconds = sympy.Max(nbytes / rate, instructions / (ISSUE * THREADS)) + CALL + 2 * _PHASE + sympy.Piecewise((0, THREADS <= 1), (WAKE, True))
    bound = sympy.Max(nbytes / BANDWIDTH, M * VALUES / 16 * _WIDTH[isa] / (ISSUE * THREADS))
    return Model(nbytes, 2 * M * VALUES, instructions, seconds, bound)


def _matmul() -> Model:
    nbytes = VALUES * VALUE + _activations()
    copies = 2 * M * (BLOCKS_IN * BLOCKS_OUT * RANK + N) * OUT / BANDWIDTH
    rate = sympy.Min(THREADS * SINGLE, BANDWIDTH)
    products = sympy.Max(nbytes / rate, M * VALUES / (0.94 * PRODUCT * THREADS))
    seconds = products + copies + (BLOCKS_IN + BLOCKS_OUT) * (CALL + 2 * WAKE)
    return Model(nbytes, 2 * M * VALUES, M * VALUES, seconds, sympy.Max(nbytes / BANDWIDTH, M * VALUES / (PRODUCT * THREADS)))


def _codes(isa: str) -> Model:
    width, dot = _WIDTH[isa], _DOT[isa]
    nbytes = VALUES * (BITS / 8 + META / GROUP) + _activations()
    steps = VALUES / 64
    extract = sympy.Piecewise((1, sympy.Eq(BITS, 8)), (2.5 * PARTS, True)) * width
    fold = VALUES / 16 / sympy.Min(GROUP, 32) * width
    each = sympy.Piecewise((1, M <= 1), (1 + 0.6 * DIGITS, True))
    take = 1.2 * M * (K + BLOCKS_IN * BLOCKS_OUT * RANK) * width
    instructions = steps * (extract * sympy.ceiling(M / 4) + M * DIGITS * dot * each) + fold * (3 + 3 * M) + take
    rate = sympy.Min(THREADS * SINGLE, BANDWIDTH)
    seconds = sympy.Max(nbytes / rate, instructions / (ISSUE * THREADS)) + CALL + 3 * _PHASE + sympy.Piecewise((0, THREADS <= 1), (WAKE, True))
    bound = sympy.Max(nbytes / BANDWIDTH, M * VALUES * DIGITS * dot / 64 / (ISSUE * THREADS))
    return Model(nbytes, 2 * M * VALUES, instructions, seconds, bound)
