"""Cost model: bytes, arithmetic, instructions and seconds of one kernel call as sympy expressions.

A kernel's provider owns one `Model` per path (see kernels/*/cost.py), over the symbols of the problem (`m, n, k, bits, ...`), of the
configuration (`threads`, tile sizes) and of the machine (`bandwidth`, `issue`, ...). The same expression gates a rewrite, ranks
configurations before anything is compiled, and gives the "% of bound" of a benchmark. Machines: see autotune/machines.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from effllm.lowering.op import Problem

Values = Mapping[str, float]

# the problem
M, N, K = sympy.symbols("m n k", positive=True, integer=True)
BITS, PARTS = sympy.symbols("bits parts", positive=True, integer=True)  # of a code; binary digits of its width
GROUP = sympy.Symbol("group", positive=True, integer=True)  # columns that share a scale (K where per channel)
META = sympy.Symbol("meta", positive=True)  # bytes of scale and minimum per group
DIGITS = sympy.Symbol("digits", positive=True, integer=True)  # int8 digits of an activation
ACT, OUT = sympy.symbols("act out", positive=True)  # bytes of an activation and of an output element
# a machine, as any kind of kernel sees it
BANDWIDTH, CALL = sympy.symbols("bandwidth call", positive=True)  # bytes/s with all threads or multiprocessors; s of a call

WEIGHT_BYTES = N * (K * BITS / 8 + K / GROUP * META)


@dataclass(frozen=True)
class Prediction:
    """Figures of one call. `bound` is the time that no kernel of this kind can beat: bytes at full bandwidth, or the products."""

    nbytes: float
    flops: float
    instructions: float
    seconds: float
    bound: float


@dataclass(frozen=True, eq=False)
class Model:
    """Expressions of one path of a kernel; `seconds` and `bound` hold the others inside."""

    nbytes: sympy.Expr
    flops: sympy.Expr
    instructions: sympy.Expr
    seconds: sympy.Expr
    bound: sympy.Expr

    @functools.cached_property
    def symbols(self) -> tuple[str, ...]:
        """Names that `evaluate` needs, sorted."""
        free = set[str]()
        for e in (self.nbytes, self.flops, self.instructions, self.seconds, self.bound):
            free |= {str(s) for s in sympy.sympify(e).free_symbols}
        return tuple(sorted(free))

    @functools.cached_property
    def _compiled(self) -> Callable[..., tuple[float, ...]]:
        return self._function((self.nbytes, self.flops, self.instructions, self.seconds, self.bound))

    @functools.cached_property
    def _time(self) -> Callable[..., float]:
        return self._function(sympy.sympify(self.seconds))

    def _function(self, parts: sympy.Expr | tuple[sympy.Expr, ...]) -> Callable[..., Any]:
        """Plain Python of expressions; takes the values in the order of `symbols`. Not with common parts taken out: to find them takes longer than
        all that a process ever asks of the function."""
        plain = sympy.Tuple(*parts) if isinstance(parts, tuple) else parts
        named = {s: sympy.Symbol(str(s)) for s in plain.free_symbols}
        if len(set(named.values())) < len(named):  # names alone identify symbols, whatever is assumed of them
            plain = plain.subs(named)
            named = {s: s for s in plain.free_symbols}
        order = {str(s): s for s in named}
        arguments = [order.get(name, sympy.Symbol(name)) for name in self.symbols]
        found: Callable[..., Any] = sympy.lambdify(arguments, plain, modules="math")
        return found

    def evaluate(self, values: Values) -> Prediction:
        """All figures. KeyError names a symbol that has no value."""
        return Prediction(*(float(x) for x in self._compiled(*(values[s] for s in self.symbols))))

    def time(self, values: Values) -> float:
        """Seconds alone: what ranking needs thousands of."""
        return float(self._time(*(values[s] for s in self.symbols)))


def values_of(problem: Problem, m: int | None = None) -> dict[str, float]:
    """The problem's symbols. `m` overrides its rows; dynamic rows count as one."""
    rows = m if m is not None else problem.m if problem.m is not None else 1
    size = 4 if problem.dtype == torch.float32 else 2
    a8 = problem.act == "a8"
    return {
        "m": max(1, rows),
        "n": problem.n,
        "k": problem.k,
        "bits": problem.bits,
        "parts": problem.bits.bit_count(),
        "group": problem.group or problem.k,
        "meta": (4 if problem.scale_dtype == torch.float32 else 2) * (2 if problem.affine else 1),
        "digits": 1 if a8 else 3 if size == 4 else 2,
        "act": 1 if a8 else size,
        "out": size,
    } | {name: value for name, value in problem.detail if not isinstance(value, str)}


def crossovers(best: Callable[[int], str], limit: int = 4096) -> list[tuple[int, str]]:
    """Where the answer of `best(m)` changes over 1 <= m <= limit, as (first m, answer); found by doubling and bisection."""
    found = [(1, best(1))]
    low = 1
    while low < limit:
        high = min(limit, max(low + 1, low * 2))
        if best(high) != found[-1][1]:
            left, right = low, high
            while right - left > 1:
                middle = (left + right) // 2
                left, right = (middle, right) if best(middle) == found[-1][1] else (left, middle)
            found.append((right, best(right)))
            low = right
        else:
            low = high
    return found
