"""Predicted time of the CPU kernels, as a sympy expression over the machine's symbols (autotune/cost.py).

bytes / bandwidth against issued vector instructions / issue rate, plus the call. Instructions per 64 codes: extraction (mask,
shift, merge of parts) once per four tokens, one dot product per token and digit; per group and token a few more for the scales.
"""

from __future__ import annotations

import sympy
import torch

from effllm.autotune.cost import BANDWIDTH, CALL, ISSUE
from effllm.lowering.op import Problem
from effllm.runtime.layouts.tile16 import PARTS

_DOT = {"avx512": 1, "avx2": 6, "portable": 24}  # instructions of one 16-row x 4-column product
_WIDTH = {"avx512": 1, "avx2": 2, "portable": 4}  # instructions per operation on 64 bytes


def packed_bytes(problem: Problem) -> int:
    """Bytes of the weight that one call reads."""
    groups = problem.k // problem.group if problem.group else 1
    per_group = (4 if problem.scale_dtype == torch.float32 else 2) * (2 if problem.affine else 1)
    return problem.n * (problem.k * problem.bits // 8 + groups * per_group)


def cost(problem: Problem, isa: str) -> sympy.Expr:
    """Seconds of one call at problem.m rows (1 where dynamic)."""
    m = problem.m or 1
    digits = 1 if problem.act == "a8" else 3 if problem.dtype == torch.float32 else 2
    units = problem.n * problem.k / 64
    extract = 1 if problem.bits == 8 else 2.5 * len(PARTS[problem.bits])
    segment = min(problem.group or problem.k, problem.k if problem.act == "a8" else 32)
    fold = problem.n / 16 * problem.k / segment * (2 + 3 * m)
    instructions = units * (extract * _WIDTH[isa] * -(-m // 4) + m * digits * _DOT[isa]) + fold * _WIDTH[isa]
    traffic = packed_bytes(problem) + m * (problem.k + 4 * problem.n)
    return sympy.Max(traffic / BANDWIDTH, instructions / ISSUE) + CALL
