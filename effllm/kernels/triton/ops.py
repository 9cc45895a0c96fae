"""The graph ops of the Triton kernels: opaque to the compiler, so that the dispatch on M stays inside, with fakes; what the bipolar ones take."""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.kernels.triton import launch, monarch_launch
from effllm.lowering.op import YES, Problem, Verdict
from effllm.runtime.formats import bipolar

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def supports(problem: Problem) -> Verdict:
    """Whether the Triton kernels take a problem."""
    if not 1 <= problem.bits <= 8:
        return Verdict(False, f"{problem.bits} bits, the kernels read 1 to 8")
    if problem.group not in (bipolar.CHANNEL, *bipolar.GROUPS):
        return Verdict(False, f"groups of {problem.group}, the kernels read {bipolar.GROUPS} or whole channels")
    if problem.dtype not in _DTYPES:
        return Verdict(False, f"activations of {problem.dtype}, the kernels take fp16, bf16 and fp32")
    if problem.scale_dtype not in (torch.float16, torch.float32):
        return Verdict(False, f"scales of {problem.scale_dtype}, the kernels read fp16 and fp32")
    if problem.n * -(-problem.k // 32) * problem.bits >= 2**31:
        return Verdict(False, "the weight has 2^31 words or more, past the kernels' 32-bit offsets")
    return YES


@torch.library.custom_op("effllm_triton::linear", mutates_args=(), device_types="cuda")
def linear(
    x: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor | None, bias: Tensor | None, n: int, bits: int, group: int, zero: float
) -> Tensor:
    """x (..., K) times the packed weight (layout words): (..., N) in x's dtype."""
    return launch.linear(x, None, codes, scale, minimum, bias, n=n, bits=bits, group=group, zero=zero, dtype=x.dtype)


@linear.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor | None, bias: Tensor | None, n: int, bits: int, group: int, zero: float) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)


@torch.library.custom_op("effllm_triton::linear_a8", mutates_args=(), device_types="cuda")
def linear_a8(
    xq: Tensor, xs: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor | None, bias: Tensor | None,
    n: int, bits: int, group: int, zero: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """int8 xq (..., K) with scales xs (..., 1) times the packed weight (layout words): (..., N) in `dtype`."""
    return launch.linear(xq, xs, codes, scale, minimum, bias, n=n, bits=bits, group=group, zero=zero, dtype=dtype)


@linear_a8.register_fake
def _(
    xq: Tensor, xs: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor | None, bias: Tensor | None,
    n: int, bits: int, group: int, zero: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return xq.new_empty(*xq.shape[:-1], n, dtype=dtype)


@torch.library.custom_op("effllm_triton::monarch_linear", mutates_args=(), device_types="cuda")
def monarch_linear(x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor | None, n: int, blocks_in: int, blocks_out: int, strided: bool) -> Tensor:
    """x (..., K) through dense Monarch factors: (..., N) in x's dtype."""
    return monarch_launch.linear(x, w1, w2, bias, n, blocks_in, blocks_out, strided)


@monarch_linear.register_fake
def _(x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor | None, n: int, blocks_in: int, blocks_out: int, strided: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)
