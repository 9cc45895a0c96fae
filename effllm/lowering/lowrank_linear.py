"""Ops of low-rank weights with dense factors, alone and with a sparse part.

    lowrank_linear          y = concat(x B^T, x[..., channels]) A^T + bias    a (N, r + c), b (r, K), channels (c) int64
                            with pivots (N) int64: concat(z, A z) with column i moved to pivots[i], z = x B^T, a (N - r, r)
    lowrank_linear_many     siblings that share x: first stages as one, outputs side by side
    sparse_lowrank_linear   y = (x B^T) A^T + x S^T + bias                    S (N, K) in CSR: values (nnz), columns (nnz), rows (N + 1)

Factors are bf16, fp16 or fp32, row-major. Columns are uint16 where K <= 65536, else int32; rows int32. Channels and the sparse part are
LOST's and SLTrain's (arXiv 2406.02214). Where a gradient is asked for, the composites decompose into the references, which
autograd differentiates with respect to x, factors, values and bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from effllm.autotune import lowrank_inputs as inputs
from effllm.lowering import gradient
from effllm.lowering.bipolar_linear import plain, run
from effllm.lowering.op import YES, Op, Problem, Provider, define, rows_of


def lowrank_reference(x: Tensor, a: Tensor, b: Tensor, channels: Tensor | None, pivots: Tensor | None, bias: Tensor | None) -> Tensor:
    """x (..., K) to (..., N) in x's dtype, factors rounded to it; the intermediate is in x's dtype too."""
    middle = linear(x, b.to(x.dtype))
    if pivots is not None:
        return placed(middle, linear(middle, a.to(x.dtype)), pivots, bias)
    if channels is not None:
        middle = torch.cat([middle, x.index_select(-1, channels)], -1)
    return linear(middle, a.to(x.dtype), None if bias is None else bias.to(x.dtype))


def placed(first: Tensor, rest: Tensor, pivots: Tensor, bias: Tensor | None) -> Tensor:
    """concat(first, rest) with column i moved to pivots[i], plus bias."""
    both = torch.cat([first, rest], -1)
    y = torch.empty_like(both).index_copy(-1, pivots, both)
    return y if bias is None else y + bias.to(y.dtype)


def lowrank_many_reference(x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], pivots: Sequence[Tensor]) -> Tensor:
    """Several low-rank weights that share x (..., K): their outputs side by side, (..., sum of N)."""
    ranks = [f.shape[0] for f in b]
    middle = linear(x, torch.cat([f.to(x.dtype) for f in b])).split(ranks, -1)
    second = [linear(part, f.to(x.dtype)) for part, f in zip(middle, a, strict=True)]
    if pivots:
        second = [placed(z, rest, p, None) for z, rest, p in zip(middle, second, pivots, strict=True)]
    return torch.cat(second, -1)


def sparse_dense(values: Tensor, columns: Tensor, rows: Tensor, k: int) -> Tensor:
    """The dense (N, K) value of a CSR matrix, in the dtype of its values; differentiable with respect to them."""
    n = rows.shape[0] - 1
    counts = (rows[1:] - rows[:-1]).long()
    row = torch.repeat_interleave(torch.arange(n, device=rows.device), counts, output_size=values.shape[0])
    return values.new_zeros(n * k).index_put((row * k + columns.long(),), values, accumulate=True).view(n, k)


def sparse_lowrank_reference(x: Tensor, a: Tensor, b: Tensor, values: Tensor, columns: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., K) to (..., N): the low-rank product plus the sparse one. Makes S dense."""
    y = lowrank_reference(x, a, b, None, None, bias)
    return y + linear(x, sparse_dense(values, columns, rows, x.shape[-1]).to(x.dtype))


def problem_of(
    op: str, n: int, k: int, rank: int, factor: torch.dtype, *, m: int | None = None, dtype: torch.dtype = torch.bfloat16, device: str = "cpu",
    channels: int = 0, nonzeros: int = 0, second: int | None = None, pivoted: bool = False,
) -> Problem:  # fmt: skip
    """The kernel problem of one of the ops; `rank` and `n` are sums over siblings, `factor` is the dtype of the factors.

    `second` is the number of values of the second factors; left out, of one factor, or of siblings as the input generator makes them.
    """
    if second is None:
        pairs = inputs.siblings(n, rank) if op.endswith("_many") else [(n, rank + channels)]
        second = sum((size - r if pivoted else size) * r for size, r in pairs)
    detail = (
        ("channels", channels), ("factor", str(factor).removeprefix("torch.")), ("nonzeros", nonzeros), ("pivoted", int(pivoted)), ("rank", rank),
        ("second", second),
    )  # fmt: skip
    return Problem(op, n, k, 0, 0, False, "a16", m, dtype, device, torch.float16, detail)


def _of(op: str, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], **more: Any) -> Problem:
    n, rank = sum(f.shape[0] for f in a), sum(f.shape[0] for f in b)
    second = sum(f.shape[0] * f.shape[1] for f in a)
    return problem_of(op, n, int(x.shape[-1]), rank, a[0].dtype, m=rows_of(x), dtype=x.dtype, device=x.device.type, second=second, **more)


def _problem(x, a, b, channels, pivots, bias, kernel):  # type: ignore[no-untyped-def]
    found = _of("lowrank_linear", x, [a], [b], channels=0 if channels is None else channels.shape[0], pivoted=pivots is not None)
    return (found if pivots is None else replace(found, n=int(pivots.shape[0]))), plain(kernel)


def _problem_many(x, a, b, pivots, kernel):  # type: ignore[no-untyped-def]
    found = _of("lowrank_linear_many", x, a, b, pivoted=bool(pivots))
    return (replace(found, n=found.n + sum(f.shape[0] for f in b)) if pivots else found), plain(kernel)


def _problem_sparse(x, a, b, values, columns, rows, bias, kernel):  # type: ignore[no-untyped-def]
    return _of("sparse_lowrank_linear", x, [a], [b], nonzeros=values.shape[0]), plain(kernel)


def _lowrank(x, a, b, channels, pivots, bias, kernel):  # type: ignore[no-untyped-def]
    if gradient.wanted(x, a, b, bias):
        return lowrank_reference(x, a, b, channels, pivots, bias)
    return run("lowrank_linear", x, a, b, channels, pivots, bias, kernel)


def _many(x, a, b, pivots, kernel):  # type: ignore[no-untyped-def]
    if gradient.wanted(x, a, b):
        return lowrank_many_reference(x, a, b, pivots)
    return run("lowrank_linear_many", x, a, b, pivots, kernel)


def _sparse(x, a, b, values, columns, rows, bias, kernel):  # type: ignore[no-untyped-def]
    if gradient.wanted(x, a, b, values, bias):
        return sparse_lowrank_reference(x, a, b, values, columns, rows, bias)
    return run("sparse_lowrank_linear", x, a, b, values, columns, rows, bias, kernel)


_FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def _define(schema: str, reference: Any, composite: Any, problem: Any) -> Op:
    op = define(f"{schema} -> Tensor", reference, composite, tolerance=_FLOOR, inputs=inputs.lowrank, problem=problem)
    op.register(Provider("reference", op.name, "any", "dense", lambda p: YES, reference, rank=-1))
    return op


LOWRANK = _define(
    "lowrank_linear(Tensor x, Tensor a, Tensor b, Tensor? channels, Tensor? pivots, Tensor? bias, str kernel)", lowrank_reference, _lowrank, _problem
)
LOWRANK_MANY = _define("lowrank_linear_many(Tensor x, Tensor[] a, Tensor[] b, Tensor[] pivots, str kernel)", lowrank_many_reference, _many, _problem_many)
SPARSE_LOWRANK = _define(
    "sparse_lowrank_linear(Tensor x, Tensor a, Tensor b, Tensor values, Tensor columns, Tensor rows, Tensor? bias, str kernel)",
    sparse_lowrank_reference, _sparse, _problem_sparse,
)  # fmt: skip
