"""The graph op `effllm_triton::nm_linear`, opaque to the compiler so that the dispatch on M stays inside, and the providers over it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effllm.kernels.triton import nm_launch
from effllm.lowering.nm_linear import ARMOR, NM, NM_BIPOLAR
from effllm.lowering.op import YES, Problem, Provider, Verdict
from effllm.runtime.formats import bipolar

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BLOCKS = (16, 32, 64, 128)


@torch.library.custom_op("effllm_triton::nm_linear", mutates_args=(), device_types="cuda")
def nm_linear(
    x: Tensor, values: Tensor, scale: Tensor | None, minimum: Tensor | None, index: Tensor, left: Tensor | None, right: Tensor | None, bias: Tensor | None,
    n: int, bits: int, group: int, zero: float,
) -> Tensor:  # fmt: skip
    """x (..., K) times the packed 2:4 weight (layout nm_words), between ARMOR's wrappers where given: (..., N) in x's dtype."""
    return nm_launch.linear(x, values, scale, minimum, index, left, right, bias, n=n, bits=bits, group=group, zero=zero)


@nm_linear.register_fake
def _(
    x: Tensor, values: Tensor, scale: Tensor | None, minimum: Tensor | None, index: Tensor, left: Tensor | None, right: Tensor | None, bias: Tensor | None,
    n: int, bits: int, group: int, zero: float,
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], n)


def supports(problem: Problem) -> Verdict:
    """Whether the Triton kernels take an N:M problem."""
    about = dict(problem.detail)
    if (about.get("keep"), about.get("of")) != (2, 4):
        return Verdict(False, f"the kernels read 2:4 weights, not {about.get('keep')}:{about.get('of')}")
    if problem.bits not in (0, 4, 8):
        return Verdict(False, f"codes of {problem.bits} bits, the kernels read 4 and 8")
    if problem.bits and problem.group not in (bipolar.CHANNEL, *bipolar.GROUPS):
        return Verdict(False, f"groups of {problem.group}, the kernels read {bipolar.GROUPS} or whole channels")
    if problem.dtype not in _DTYPES:
        return Verdict(False, f"activations of {problem.dtype}, the kernels take fp16, bf16 and fp32")
    if about.get("block", 0) and about["block"] not in BLOCKS:
        return Verdict(False, f"blocks of {about['block']}, the kernels take {BLOCKS}")
    if problem.n * problem.k >= 2**31:
        return Verdict(False, "the weight has 2^31 elements or more, past the kernels' 32-bit offsets")
    return YES


def _nm(x, values, index, bias, n, k, keep, of):  # type: ignore[no-untyped-def]
    return nm_linear(x, values, None, None, index, None, None, bias, n, 0, 0, 0.0)


def _bipolar(x, codes, scale, minimum, index, bias, n, k, keep, of, bits, group, zero):  # type: ignore[no-untyped-def]
    return nm_linear(x, codes, scale, minimum, index, None, None, bias, n, bits, group, zero)


def _armor(x, left, values, scale, minimum, index, right, bias, n, k, keep, of, bits, group, zero):  # type: ignore[no-untyped-def]
    return nm_linear(x, values, scale, minimum, index, left, right, bias, n, bits, group, zero)


def register() -> None:
    """Add the provider "triton" to the N:M ops; calling it again changes nothing."""
    calls: dict[str, Any] = {"nm_linear": _nm, "nm_bipolar_linear": _bipolar, "armor_linear": _armor}
    for op in (NM, NM_BIPOLAR, ARMOR):
        op.register(Provider("triton", op.name, "cuda", "nm_words", supports, calls[op.name], rank=10))
