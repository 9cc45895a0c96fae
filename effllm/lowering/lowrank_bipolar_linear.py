"""Ops of low-rank weights whose factors are both bipolar-INT: y = (x B^T) A^T + bias, with 16-bit (or fp32) activations.

    lowrank_bipolar_linear        A (N, r) and B (r, K) as codes, scale and minimum in the layout of the named kernel
    lowrank_bipolar_linear_many   siblings that share x, outputs side by side; N and r are those of full tiles

Each factor has its bits, group and zero point. A kernel runs both stages in one call. Where a gradient is asked for, the composites decompose
into two linears through the dense values of the factors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effllm.autotune import lowrank_inputs as inputs
from effllm.lowering import gradient
from effllm.lowering.bipolar_linear import linear_reference, plain, provider, run, weight
from effllm.lowering.lowrank_linear import placed
from effllm.lowering.op import YES, Op, Problem, Provider, define, rows_of
from effllm.runtime import layouts


def reference(
    x: Tensor, a_codes: Tensor, a_scale: Tensor, a_minimum: Tensor | None, b_codes: Tensor, b_scale: Tensor, b_minimum: Tensor | None,
    pivots: Tensor | None, bias: Tensor | None, n: int, rank: int, a_bits: int, a_group: int, a_zero: float, b_bits: int, b_group: int, b_zero: float,
) -> Tensor:  # fmt: skip
    """x (..., K) to (..., N) (layout planes): two bipolar linears with the intermediate in x's dtype."""
    middle = linear_reference(x, b_codes, b_scale, b_minimum, None, rank, b_bits, b_group, b_zero)
    if pivots is not None:
        return placed(middle, linear_reference(middle, a_codes, a_scale, a_minimum, None, n, a_bits, a_group, a_zero), pivots, bias)
    return linear_reference(middle, a_codes, a_scale, a_minimum, bias, n, a_bits, a_group, a_zero)


def many_reference(
    x: Tensor, a_codes: Sequence[Tensor], a_scale: Sequence[Tensor], a_minimum: Sequence[Tensor], b_codes: Sequence[Tensor], b_scale: Sequence[Tensor],
    b_minimum: Sequence[Tensor], a_bits: int, a_group: int, a_zero: float, b_bits: int, b_group: int, b_zero: float,
) -> Tensor:  # fmt: skip
    """Several weights (layout planes) that share x: their outputs side by side, (..., sum of N)."""
    found = []
    for i, (a, b) in enumerate(zip(a_codes, b_codes, strict=True)):
        first = (a, a_scale[i], a_minimum[i] if a_minimum else None)
        second = (b, b_scale[i], b_minimum[i] if b_minimum else None)
        found.append(reference(x, *first, *second, None, None, a.shape[1], b.shape[1], a_bits, a_group, a_zero, b_bits, b_group, b_zero))
    return torch.cat(found, -1)


def problem_of(
    op: str, n: int, k: int, rank: int, *, bits: int, group: int, affine: bool,
    b_bits: int | None = None, b_group: int | None = None, b_affine: bool | None = None, m: int | None = None,
    dtype: torch.dtype = torch.bfloat16, device: str = "cpu", scale_dtype: torch.dtype = torch.float16,
    second: int | None = None, pivoted: bool = False,
) -> Problem:  # fmt: skip
    """The kernel problem: bits, group and affine are A's; B's are the same unless given. `n` and `rank` are sums over siblings.

    `second` is the number of A's values; left out, of one factor, or of siblings as the input generator makes them.
    """
    if second is None:
        rows = n - rank if pivoted else n
        second = rows * rank if not op.endswith("_many") else sum(size * r for size, r in inputs.full_siblings(n, rank))
    other = (int(affine if b_affine is None else b_affine), b_bits or bits, group if b_group is None else b_group)
    detail = (*zip(("b_affine", "b_bits", "b_group"), other, strict=True), ("pivoted", int(pivoted)), ("rank", rank), ("second", second))
    return Problem(op, n, k, bits, group, affine, "a16", m, dtype, device, scale_dtype, detail)


def stages(problem: Problem) -> tuple[Problem, Problem]:
    """The two bipolar linears that the weight consists of: x times B, and the intermediate times A."""
    d = {name: int(value) for name, value in problem.detail}

    def one(n: int, k: int, bits: int, group: int, affine: bool) -> Problem:
        return Problem("bipolar_linear", n, k, bits, group, affine, "a16", problem.m, problem.dtype, problem.device, problem.scale_dtype)

    first = one(d["rank"], problem.k, d["b_bits"], d["b_group"], bool(d["b_affine"]))
    # siblings together have fewer values than one factor of their outputs and ranks would
    return first, one(-(-d["second"] // d["rank"]), d["rank"], problem.bits, problem.group, problem.affine)


def _full(op: str, kernel: str, codes: Tensor) -> int:
    return int(layouts.get(provider(op, kernel).layout).full_rows(codes))


def _problem(x, ac, as_, am, bc, bs, bm, pivots, bias, n, rank, a_bits, a_group, a_zero, b_bits, b_group, b_zero, kernel):  # type: ignore[no-untyped-def]
    about = {"m": rows_of(x), "dtype": x.dtype, "device": x.device.type, "scale_dtype": as_.dtype}
    grids = {"bits": a_bits, "group": a_group, "affine": am is not None, "b_bits": b_bits, "b_group": b_group, "b_affine": bm is not None}
    rows = n if pivots is None else int(pivots.shape[0])
    return problem_of("lowrank_bipolar_linear", rows, int(x.shape[-1]), rank, **grids, **about, pivoted=pivots is not None), plain(kernel)


def _problem_many(x, ac, as_, am, bc, bs, bm, a_bits, a_group, a_zero, b_bits, b_group, b_zero, kernel):  # type: ignore[no-untyped-def]
    op = "lowrank_bipolar_linear_many"
    sizes, ranks = ([_full(op, kernel, c) for c in codes] for codes in (ac, bc))
    n, rank, second = sum(sizes), sum(ranks), sum(s * r for s, r in zip(sizes, ranks, strict=True))
    about = {"m": rows_of(x), "dtype": x.dtype, "device": x.device.type, "scale_dtype": as_[0].dtype, "second": second}
    grids = {"bits": a_bits, "group": a_group, "affine": bool(am), "b_bits": b_bits, "b_group": b_group, "b_affine": bool(bm)}
    return problem_of(op, n, int(x.shape[-1]), rank, **grids, **about), plain(kernel)


def _dense(x, a, b, pivots, bias, n, rank, a_grid, b_grid, layout):  # type: ignore[no-untyped-def]
    """Through the dense factors, for autograd; a and b are (codes, scale, minimum), grids (bits, group, zero)."""
    first = weight(*b, k=x.shape[-1], n=rank, bits=b_grid[0], group=b_grid[1], zero=b_grid[2], layout=layout)
    second = weight(*a, k=rank, n=n, bits=a_grid[0], group=a_grid[1], zero=a_grid[2], layout=layout)
    middle = torch.nn.functional.linear(x, first.to(x.dtype))
    if pivots is not None:
        return placed(middle, torch.nn.functional.linear(middle, second.to(x.dtype)), pivots, bias)
    return torch.nn.functional.linear(middle, second.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _lowrank(x, ac, as_, am, bc, bs, bm, pivots, bias, n, rank, a_bits, a_group, a_zero, b_bits, b_group, b_zero, kernel):  # type: ignore[no-untyped-def]
    if gradient.wanted(x, as_, am, bs, bm, bias):
        layout = provider("lowrank_bipolar_linear", kernel).layout
        return _dense(x, (ac, as_, am), (bc, bs, bm), pivots, bias, n, rank, (a_bits, a_group, a_zero), (b_bits, b_group, b_zero), layout)
    operands = (ac, as_, am, bc, bs, bm, pivots, bias)
    return run("lowrank_bipolar_linear", x, *operands, n, rank, a_bits, a_group, a_zero, b_bits, b_group, b_zero, kernel)


def _many(x, ac, as_, am, bc, bs, bm, a_bits, a_group, a_zero, b_bits, b_group, b_zero, kernel):  # type: ignore[no-untyped-def]
    op = "lowrank_bipolar_linear_many"
    if gradient.wanted(x, as_, am, bs, bm):
        layout, grids = provider(op, kernel).layout, ((a_bits, a_group, a_zero), (b_bits, b_group, b_zero))
        found = []
        for i, (a, b) in enumerate(zip(ac, bc, strict=True)):
            factors = (a, as_[i], am[i] if am else None), (b, bs[i], bm[i] if bm else None)
            found.append(_dense(x, *factors, None, None, _full(op, kernel, a), _full(op, kernel, b), *grids, layout))
        return torch.cat(found, -1)
    return run(op, x, ac, as_, am, bc, bs, bm, a_bits, a_group, a_zero, b_bits, b_group, b_zero, kernel)


_FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
_GRIDS = "int a_bits, int a_group, float a_zero, int b_bits, int b_group, float b_zero, str kernel"
LOWRANK_BIPOLAR: Op = define(
    "lowrank_bipolar_linear(Tensor x, Tensor a_codes, Tensor a_scale, Tensor? a_minimum, Tensor b_codes, Tensor b_scale, Tensor? b_minimum, "
    f"Tensor? pivots, Tensor? bias, int n, int rank, {_GRIDS}) -> Tensor",
    reference,
    _lowrank,
    tolerance=_FLOOR,
    inputs=inputs.bipolar,
    problem=_problem,
)
# Merging needs a kernel that takes lists; the reference registers none, so that it keeps its ops apart.
LOWRANK_BIPOLAR_MANY: Op = define(
    "lowrank_bipolar_linear_many(Tensor x, Tensor[] a_codes, Tensor[] a_scale, Tensor[] a_minimum, Tensor[] b_codes, Tensor[] b_scale, Tensor[] b_minimum, "
    f"{_GRIDS}) -> Tensor",
    many_reference,
    _many,
    tolerance=_FLOOR,
    inputs=inputs.bipolar,
    problem=_problem_many,
)
LOWRANK_BIPOLAR.register(Provider("reference", LOWRANK_BIPOLAR.name, "any", "planes", lambda p: YES, reference, rank=-1))
