"""Ops of activation sparsity with bipolar-INT weights: see sparse_linear.py for masks, rows and limits.

    sparse_bipolar_linear      y = W (x masked) + bias               codes by input channel (runtime/layouts/input_major.py)
    sparse_up_bipolar_linear   y_j = gate_j (W_j x + bias_j) or 0    codes by output row (runtime/layouts/row_major.py)

W = 2 * scale * (u - zero) or 2 * scale * u + minimum, of 1 to 8 bits; a skipped channel saves the bytes of its codes, not those of scales.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effllm.autotune import sparse_inputs
from effllm.lowering import gradient
from effllm.lowering.bipolar_linear import plain, run
from effllm.lowering.op import YES, Op, Problem, Provider, define, rows_of
from effllm.lowering.sparse_linear import problem, sparse_linear_torch, sparse_up_linear_torch
from effllm.runtime.layouts import input_major, row_major


def sparse_bipolar_linear_torch(
    x: Tensor, threshold: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor | None, bias: Tensor | None,
    n: int, bits: int, group: int, zero: float, limit: int,
) -> Tensor:  # fmt: skip
    """x (..., K) to (..., N) in x's dtype with fp32 weights rounded once, in plain torch."""
    return sparse_linear_torch(x, threshold, input_major.weight(codes, scale, minimum, n=n, bits=bits, group=group, zero=zero), bias, limit)


def sparse_up_bipolar_linear_torch(
    x: Tensor, gate: Tensor, threshold: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor | None, bias: Tensor | None,
    bits: int, group: int, zero: float, limit: int,
) -> Tensor:  # fmt: skip
    """x (..., K) and gate (..., N) to (..., N) in x's dtype with fp32 weights rounded once, in plain torch."""
    w = row_major.weight(codes, scale, minimum, k=x.shape[-1], bits=bits, group=group, zero=zero)
    return sparse_up_linear_torch(x, gate, threshold, w, bias, limit)


def _of(op: str, x: Tensor, n: int, scale: Tensor, minimum: Tensor | None, bits: int, group: int, limit: int) -> Problem:
    return problem(
        op, int(n), int(x.shape[-1]), m=rows_of(x), dtype=x.dtype, device=x.device.type, bits=bits, group=group, affine=minimum is not None,
        scale_dtype=scale.dtype, limit=limit,
    )  # fmt: skip


def _problem(x, threshold, codes, scale, minimum, bias, n, bits, group, zero, limit, kernel):  # type: ignore[no-untyped-def]
    return _of("sparse_bipolar_linear", x, n, scale, minimum, bits, group, limit), plain(kernel)


def _problem_up(x, gate, threshold, codes, scale, minimum, bias, bits, group, zero, limit, kernel):  # type: ignore[no-untyped-def]
    return _of("sparse_up_bipolar_linear", x, codes.shape[0], scale, minimum, bits, group, limit), plain(kernel)


def _sparse(x, threshold, codes, scale, minimum, bias, n, bits, group, zero, limit, kernel):  # type: ignore[no-untyped-def]
    if gradient.wanted(x, threshold, scale, minimum, bias):
        return sparse_bipolar_linear_torch(x, threshold, codes, scale, minimum, bias, n, bits, group, zero, limit)
    return run("sparse_bipolar_linear", x, threshold, codes, scale, minimum, bias, n, bits, group, zero, limit, kernel)


def _up(x, gate, threshold, codes, scale, minimum, bias, bits, group, zero, limit, kernel):  # type: ignore[no-untyped-def]
    if gradient.wanted(x, gate, threshold, scale, minimum, bias):
        return sparse_up_bipolar_linear_torch(x, gate, threshold, codes, scale, minimum, bias, bits, group, zero, limit)
    return run("sparse_up_bipolar_linear", x, gate, threshold, codes, scale, minimum, bias, bits, group, zero, limit, kernel)


_FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
_CODED = "Tensor codes, Tensor scale, Tensor? minimum, Tensor? bias"


def _define(schema: str, layout: str, reference: Any, composite: Any, read: Any) -> Op:
    op = define(f"{schema} -> Tensor", reference, composite, tolerance=_FLOOR, inputs=sparse_inputs.sparse, problem=read)
    op.register(Provider("reference", op.name, "any", layout, lambda p: YES, reference, rank=-1))
    return op


SPARSE_BIPOLAR = _define(
    f"sparse_bipolar_linear(Tensor x, Tensor threshold, {_CODED}, int n, int bits, int group, float zero, int limit, str kernel)", "input_major",
    sparse_bipolar_linear_torch, _sparse, _problem,
)  # fmt: skip
SPARSE_UP_BIPOLAR = _define(
    f"sparse_up_bipolar_linear(Tensor x, Tensor gate, Tensor threshold, {_CODED}, int bits, int group, float zero, int limit, str kernel)", "row_major",
    sparse_up_bipolar_linear_torch, _up, _problem_up,
)  # fmt: skip
