"""Ops of activation sparsity with floating-point weights: channels whose activation is small are skipped, and their bytes with them.

    sparse_linear      y = W (x masked) + bias                          mask |x_k| > threshold (1 or K values); weight_t (K, N)
    sparse_up_linear   y_j = gate_j (W_j x + bias_j) or 0               mask |gate_j| > threshold (1 or N values); weight (N, K)
    rsparse_linear     y = W (x masked) + U V (x - x masked) + bias     mask |x_k| colnorm_k > threshold; u (N, r), v (r, K)

Channels are skipped where |x| <= threshold, so NaN is never skipped, in x or in the threshold; comparisons are in fp32, thresholds are
fp32. Rows of a batch have masks of their own. Thresholds apply to calls of at most `limit` rows (in a decoder: to decoding, not to
prefill), to all calls where it is negative; other calls are dense products. Weights are taken to be finite: what is skipped adds zero.

Sources: TEAL (arXiv 2408.14690), CATS (arXiv 2404.08763), CHESS (arXiv 2409.01366), R-Sparse (arXiv 2504.19449).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from effllm.autotune import sparse_inputs
from effllm.lowering import gradient
from effllm.lowering.bipolar_linear import plain, run
from effllm.lowering.op import YES, Op, Problem, Provider, define, rows_of

LIMIT = 4  # rows that the kernels take together, reading the union of their channels
EVERY_ROW = -1  # a limit that sparsifies every call, for measuring quality


def thresholds_for(x: Tensor, threshold: Tensor, limit: int) -> Tensor | None:
    """The thresholds of a call with x (..., K): None where the call is dense. Dynamic rows decide in the graph, without a guard."""
    if limit < 0:
        return threshold
    m = rows_of(x)
    if m is not None:
        return threshold if m <= limit else None
    count = 1
    for size in x.shape[:-1]:
        count = count * size
    return torch.where(torch.scalar_tensor(count, device=threshold.device) <= limit, threshold, -1.0)


def masked(x: Tensor, threshold: Tensor | None, norm: Tensor | None = None) -> Tensor:
    """x (..., K) with zeros where |x| (times `norm`) is at most the threshold."""
    if threshold is None:
        return x
    size = x.abs().float()
    return torch.where((size if norm is None else size * norm.float()) <= threshold.float(), 0.0, x).to(x.dtype)


def sparse_linear_torch(x: Tensor, threshold: Tensor, weight_t: Tensor, bias: Tensor | None, limit: int) -> Tensor:
    """x (..., K) to (..., N) in x's dtype, in plain torch."""
    return linear(masked(x, thresholds_for(x, threshold, limit)), weight_t.t().to(x.dtype), None if bias is None else bias.to(x.dtype))


def sparse_up_linear_torch(x: Tensor, gate: Tensor, threshold: Tensor, weight: Tensor, bias: Tensor | None, limit: int) -> Tensor:
    """x (..., K) and gate (..., N), after the activation function, to (..., N) in x's dtype, in plain torch."""
    y = gate.to(x.dtype) * linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    found = thresholds_for(x, threshold, limit)
    return y if found is None else torch.where(gate.abs().float() <= found.float(), 0.0, y).to(x.dtype)


def rsparse_linear_torch(
    x: Tensor, threshold: Tensor, colnorm: Tensor, weight_t: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, limit: int
) -> Tensor:
    """x (..., K) to (..., N) in x's dtype, in plain torch; a dense call is W x alone."""
    found = thresholds_for(x, threshold, limit)
    kept = masked(x, found, colnorm)
    y = linear(kept, weight_t.t().to(x.dtype), None if bias is None else bias.to(x.dtype))
    # the difference would make NaN of infinity
    return y if found is None else y + linear(linear(torch.where(kept == 0, x, 0.0).to(x.dtype), v.to(x.dtype)), u.to(x.dtype))


def problem(
    op: str, n: int, k: int, *, m: int | None = None, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", values: torch.dtype | None = torch.bfloat16,
    bits: int = 0, group: int = 0, affine: bool = False, scale_dtype: torch.dtype = torch.float16, rank: int = 0, limit: int = LIMIT, density: float = 0.5,
) -> Problem:  # fmt: skip
    """The kernel problem of one of the ops; `density` is the expected share of channels that are read, `values` the dtype of a dense weight."""
    stored = () if bits or values is None else (("value_bytes", values.itemsize), ("values", str(values).removeprefix("torch.")))
    detail = (("density", density), ("limit", limit), ("rank", rank), *stored)
    return Problem(op, n, k, bits, group, affine, "a16", m, dtype, device, scale_dtype, detail)


def _of(op: str, x: Tensor, n: int, w: Tensor, limit: int, rank: int = 0) -> Problem:
    return problem(op, int(n), int(x.shape[-1]), m=rows_of(x), dtype=x.dtype, device=x.device.type, values=w.dtype, rank=rank, limit=limit)


def _problem(x, threshold, weight_t, bias, limit, kernel):  # type: ignore[no-untyped-def]
    return _of("sparse_linear", x, weight_t.shape[1], weight_t, limit), plain(kernel)


def _problem_up(x, gate, threshold, weight, bias, limit, kernel):  # type: ignore[no-untyped-def]
    return _of("sparse_up_linear", x, weight.shape[0], weight, limit), plain(kernel)


def _problem_rsparse(x, threshold, colnorm, weight_t, u, v, bias, limit, kernel):  # type: ignore[no-untyped-def]
    return _of("rsparse_linear", x, weight_t.shape[1], weight_t, limit, int(v.shape[0])), plain(kernel)


def _sparse(x, threshold, weight_t, bias, limit, kernel):  # type: ignore[no-untyped-def]
    if gradient.wanted(x, threshold, weight_t, bias):
        return sparse_linear_torch(x, threshold, weight_t, bias, limit)
    return run("sparse_linear", x, threshold, weight_t, bias, limit, kernel)


def _up(x, gate, threshold, weight, bias, limit, kernel):  # type: ignore[no-untyped-def]
    if gradient.wanted(x, gate, threshold, weight, bias):
        return sparse_up_linear_torch(x, gate, threshold, weight, bias, limit)
    return run("sparse_up_linear", x, gate, threshold, weight, bias, limit, kernel)


def _rsparse(x, threshold, colnorm, weight_t, u, v, bias, limit, kernel):  # type: ignore[no-untyped-def]
    if gradient.wanted(x, threshold, weight_t, u, v, bias):
        return rsparse_linear_torch(x, threshold, colnorm, weight_t, u, v, bias, limit)
    return run("rsparse_linear", x, threshold, colnorm, weight_t, u, v, bias, limit, kernel)


_FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def _define(schema: str, reference: Any, composite: Any, read: Any) -> Op:
    op = define(f"{schema} -> Tensor", reference, composite, tolerance=_FLOOR, inputs=sparse_inputs.sparse, problem=read)
    op.register(Provider("reference", op.name, "any", "dense", lambda p: YES, reference, rank=-1))
    return op


SPARSE = _define("sparse_linear(Tensor x, Tensor threshold, Tensor weight_t, Tensor? bias, int limit, str kernel)", sparse_linear_torch, _sparse, _problem)
SPARSE_UP = _define(
    "sparse_up_linear(Tensor x, Tensor gate, Tensor threshold, Tensor weight, Tensor? bias, int limit, str kernel)", sparse_up_linear_torch, _up, _problem_up
)
RSPARSE = _define(
    "rsparse_linear(Tensor x, Tensor threshold, Tensor colnorm, Tensor weight_t, Tensor u, Tensor v, Tensor? bias, int limit, str kernel)",
    rsparse_linear_torch, _rsparse, _problem_rsparse,
)  # fmt: skip
