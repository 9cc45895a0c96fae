"""Cost of the fused two-stage linears (lowrank.cpp), one model per instruction set and path.

    fused      T = max(bytes / bandwidth(t), instructions / (issue t)) + call + wake [t > 1],    bandwidth(t) = min(t single, bandwidth)
    products   T = M (r K + N (r + c)) / product + traffic of the intermediate + 2 call + wake: PyTorch's own, for many rows

Per 32 weights of a fused stage: a load and two widenings, and for each row of x two multiply-adds and a share of the loads of x. A nonzero of
the sparse part costs a handful of scalar instructions a row (fused), or a vector multiply-add per 16 rows (products).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import sympy
import torch

from effllm.autotune.cost import ACT, BANDWIDTH, CALL, OUT, K, M, Model, N, values_of
from effllm.kernels.cpu.cost import ISSUE, PRODUCT, SINGLE, THREADS, WAKE
from effllm.lowering.op import Problem

RANK, SECOND, NONZEROS = sympy.symbols("rank second nonzeros", nonnegative=True)  # SECOND: values of A
VALUE, INDEX, CAST = sympy.symbols("value index cast", nonnegative=True)  # bytes of a factor's element, of a column; 1 where factors are cast for `products`
PATHS = ("fused", "products")

_WIDTH = {"avx512": 1.0, "avx2": 2.0, "portable": 6.0}  # instructions per operation on 16 floats
_WIDEN = 3.0  # load, even and odd columns


@functools.cache
def models(isa: str) -> Mapping[str, Model]:
    """Path -> model of an instruction set's two-stage kernels."""
    return {path: _model(path, isa) for path in PATHS}


def _model(path: str, isa: str) -> Model:
    width = _WIDTH[isa]
    weights = RANK * K + SECOND
    nbytes = weights * VALUE + NONZEROS * (VALUE + INDEX) + M * (K * ACT + N * OUT)
    flops = 2 * M * (weights + NONZEROS)
    rate = sympy.Min(THREADS * SINGLE, BANDWIDTH)
    woken = sympy.Piecewise((0, THREADS <= 1), (WAKE, True))
    sums = M * (RANK + N) * 4
    if path == "fused":
        instructions = width * (weights / 32 * (_WIDEN * sympy.ceiling(M / 4) + 2.6 * M) + sums) + 5 * M * NONZEROS
        seconds = sympy.Max(nbytes / rate, instructions / (ISSUE * THREADS)) + CALL + woken
        return Model(nbytes, flops, instructions, seconds, nbytes / BANDWIDTH)
    instructions = width * NONZEROS * 2 * sympy.ceiling(M / 64) * 4
    products = sympy.Max((nbytes + M * RANK * OUT * 2) / rate, M * weights / (0.94 * PRODUCT * THREADS))
    cast = CAST * weights * (VALUE + 2 * OUT) / rate
    seconds = products + cast + instructions / (ISSUE * THREADS) + 3 * CALL + 3 * woken
    return Model(nbytes, flops, instructions, seconds, sympy.Max(nbytes / BANDWIDTH, M * weights / (PRODUCT * THREADS)))


def values(problem: Problem, machine: Mapping[str, float], threads: int) -> dict[str, float]:
    """The models' symbols for a problem on a machine; fp16 products run at the rate of fp32 where the processor has none of its own."""
    factor = str(dict(problem.detail).get("factor", "bfloat16"))
    found = values_of(problem) | dict(machine) | {"threads": float(threads)}
    if problem.dtype != torch.bfloat16:
        found["product"] = machine["product32"]
    found["value"] = 4.0 if factor == "float32" else 2.0
    found["index"] = 2.0 if problem.k <= 1 << 16 else 4.0
    found["cast"] = float(factor != str(problem.dtype).removeprefix("torch."))
    return found
