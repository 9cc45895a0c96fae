"""Cost model: times as sympy expressions over a machine's bandwidth, issue rate and call cost.

A kernel's provider gives its expression (see kernels/*/cost.py); here are the symbols, the dense linear to compare with, and the
evaluation on a machine. Constants are rough defaults per core, good for ranking; they are marked as predictions wherever shown.
"""

from __future__ import annotations

import sympy
import torch

BANDWIDTH, ISSUE, CALL = sympy.symbols("bandwidth issue call", positive=True)  # bytes/s, vector instructions/s, s

_PER_CORE = {"bandwidth": 20e9, "issue": 6e9}
_CPU_CALL = 4e-6
_GPU = {"bandwidth": 3e12, "issue": 3e13 / 16, "call": 3e-6}


def constants(device: str = "cpu") -> dict[sympy.Symbol, float]:
    """Values of the symbols for a device type of this machine."""
    if device != "cpu":
        return {BANDWIDTH: _GPU["bandwidth"], ISSUE: _GPU["issue"], CALL: _GPU["call"]}
    threads = torch.get_num_threads()
    return {BANDWIDTH: _PER_CORE["bandwidth"] * min(threads, 8), ISSUE: _PER_CORE["issue"] * threads, CALL: _CPU_CALL}


def dense(m: int, n: int, k: int, dtype: torch.dtype) -> sympy.Expr:
    """Seconds of a dense linear: its bytes, or 32 multiply-adds an instruction (16 in fp32)."""
    size = 4 if dtype == torch.float32 else 2
    lanes = 16 if dtype == torch.float32 else 32
    return sympy.Max((n * k + m * (n + k)) * size / BANDWIDTH, m * n * k / lanes / ISSUE) + CALL


def seconds(expr: sympy.Expr, device: str = "cpu") -> float:
    """The expression's value on this machine."""
    return float(expr.subs(constants(device)))
