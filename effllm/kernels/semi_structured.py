"""Prompts through 2:4 weights on sparse tensor cores: torch's own CUTLASS product, for graphs with enough rows to be bound by arithmetic.

    y^T (N, M) = S (N, K) x^T        values (N, K / 2) and metadata (layout nm_semi), fp32 sums, result in x's dtype

Bytes   M K itemsize + N K (2 + 1/8) / 2 + M N itemsize; half the multiplications of the dense product.
Limits  torch builds this product for compute capability 8.x only (Ampere, Ada); elsewhere, and for rows that are few or not known when
        the graph is traced, the Triton provider runs: it expands the weight and calls the vendor's dense product for a prompt. torch's
        other road, cuSPARSELt, keeps weights in a form that cannot be read back without its library, and is not used.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from effllm.autotune import machines
from effllm.lowering.nm_linear import ARMOR, NM, turn
from effllm.lowering.op import YES, Problem, Provider, Verdict
from effllm.runtime.formats import armor
from effllm.runtime.layouts.nm_semi import COLUMNS, ROWS

_ALIGN = 8  # rows of the activation that CUTLASS takes at a time


def capability() -> tuple[int, int]:
    """Compute capability of the current GPU; (0, 0) without one, or where it is not NVIDIA's."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return 0, 0
    return torch.cuda.get_device_capability()


def least_rows() -> int:
    """Rows from which a dense 16-bit product is bound by arithmetic and not by reading the weight: only there halving it pays."""
    about = machines.gpu("cuda")
    return math.ceil(about["mma16"] / about["bandwidth"])


def supports(problem: Problem) -> Verdict:
    """Whether a site's product can, and should, run on sparse tensor cores."""
    about = dict(problem.detail)
    if (about.get("keep"), about.get("of")) != (2, 4):
        return Verdict(False, f"sparse tensor cores take 2:4, not {about.get('keep')}:{about.get('of')}")
    if problem.bits:
        return Verdict(False, f"values of {problem.bits} bits with scales, sparse tensor cores take fp16 and bf16")
    stored = str(problem.dtype).removeprefix("torch.")
    if stored not in ("float16", "bfloat16") or about.get("values") != stored:
        return Verdict(False, f"values of {about.get('values')} and activations of {stored}, both must be fp16 or both bf16")
    if problem.n % ROWS or problem.k % COLUMNS:
        return Verdict(False, f"a {problem.n} x {problem.k} weight does not fill tiles of {ROWS} x {COLUMNS}")
    major, minor = capability()
    if major != 8:
        return Verdict(False, f"torch's CUTLASS product needs compute capability 8.x, this GPU has {major}.{minor}")
    if problem.m is None:
        return Verdict(False, "the number of rows is not known when the graph is traced, and few rows need another layout")
    if problem.m < (least := least_rows()):
        return Verdict(False, f"{problem.m} rows are bound by memory here, sparse tensor cores pay from {least}")
    return YES


def product(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., K) times the weight, plus bias."""
    flat = x.reshape(-1, x.shape[-1])
    rows = flat.shape[0]
    padded = torch.nn.functional.pad(flat, (0, 0, 0, -rows % _ALIGN)).contiguous()
    y = torch._sparse_semi_structured_mm(values, meta, padded.t()).t()[:rows]
    return (y if bias is None else y + bias.to(y.dtype)).reshape(*x.shape[:-1], values.shape[0])


def _nm(x, values, index, bias, n, k, keep, of, **how):  # type: ignore[no-untyped-def]
    return product(x, values, index, bias)


def _armor(x, left, values, scale, minimum, index, right, bias, n, k, keep, of, bits, group, zero, **how):  # type: ignore[no-untyped-def]
    y = turn(product(turn(x, armor.blocks(right)), values, index, None), armor.blocks(left))
    return y if bias is None else y + bias.to(y.dtype)


@functools.cache
def register() -> None:
    """Add the provider "semi-structured" to the N:M ops of floating-point values."""
    calls: dict[str, Any] = {"nm_linear": _nm, "armor_linear": _armor}
    for op in (NM, ARMOR):
        op.register(Provider("semi-structured", op.name, "cuda", "nm_semi", supports, calls[op.name], rank=20))
