"""The graph ops of the Triton kernels: opaque to the compiler, so that the dispatch on M stays inside, with fakes."""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.kernels.triton import launch, lowrank_launch, monarch_launch


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


@torch.library.custom_op("effllm_triton::lowrank", mutates_args=(), device_types="cuda")
def lowrank(x: Tensor, a: Tensor, b: Tensor, channels: Tensor | None, bias: Tensor | None) -> Tensor:
    """concat(x B^T, x[..., channels]) A^T + bias for x (..., K), b (r, K), a (N, r + c): (..., N) in x's dtype."""
    return lowrank_launch.lowrank(x, a, b, channels, bias)


@lowrank.register_fake
def _(x: Tensor, a: Tensor, b: Tensor, channels: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], a.shape[0])


@torch.library.custom_op("effllm_triton::monarch_linear", mutates_args=(), device_types="cuda")
def monarch_linear(x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor | None, n: int, blocks_in: int, blocks_out: int, strided: bool) -> Tensor:
    """x (..., K) through dense Monarch factors: (..., N) in x's dtype."""
    return monarch_launch.linear(x, w1, w2, bias, n, blocks_in, blocks_out, strided)


@monarch_linear.register_fake
def _(x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor | None, n: int, blocks_in: int, blocks_out: int, strided: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)
