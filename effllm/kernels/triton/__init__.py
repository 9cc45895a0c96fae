"""Triton kernels. Importing this package imports Triton; `effllm.lowering` does so only when a GPU site asks for it.

`register()` adds the provider "triton" to the ops that have one. Nothing here asks for a device before the first call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effllm.kernels.triton import kv_ops, launch, lowrank_ops, monarch_launch, nm_ops, ops, pie, rotated_launch, segments_launch, skip_ops
from effllm.kernels.triton.choose import TritonTuning
from effllm.kernels.triton.monarch_choose import MonarchTritonTuning
from effllm.kernels.triton.ops import supports
from effllm.lowering import bipolar_linear, monarch_linear
from effllm.lowering.op import YES, Config, Problem, Provider, Verdict

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
__all__ = ["register", "supports"]


def _linear(
    x: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor | None, bias: Tensor | None, n: int, bits: int, group: int, zero: float,
    problem: Problem | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """The graph op, which chooses when it runs; with `config` (a tuner's, outside of graphs) the launch itself."""
    if config is None:
        return ops.linear(x, codes, scale, minimum, bias, n, bits, group, zero)
    return launch.linear(x, None, codes, scale, minimum, bias, n=n, bits=bits, group=group, zero=zero, dtype=x.dtype, config=config)


def _linear_a8(
    xq: Tensor, xs: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor | None, bias: Tensor | None,
    n: int, bits: int, group: int, zero: float, dtype: torch.dtype, problem: Problem | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """As `_linear`, with int8 activations."""
    if config is None:
        return ops.linear_a8(xq, xs, codes, scale, minimum, bias, n, bits, group, zero, dtype)
    return launch.linear(xq, xs, codes, scale, minimum, bias, n=n, bits=bits, group=group, zero=zero, dtype=dtype, config=config)


def _monarch_supports(problem: Problem) -> Verdict:
    """Whether the Monarch kernels take a problem."""
    d = dict(problem.detail)
    if problem.dtype not in _DTYPES or d.get("values") not in ("float16", "bfloat16", "float32"):
        return Verdict(False, f"activations of {problem.dtype} and factors of {d.get('values') or 'unknown type'}, the kernels take fp16, bf16 and fp32")
    if max(problem.n, problem.k, int(d.get("blocks_in", 1)) * int(d.get("blocks_out", 1)) * int(d.get("rank", 1))) >= 2**26:
        return Verdict(False, "a side of 2^26 or more, past the kernels' 32-bit offsets")
    return YES


def _monarch(
    x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor | None, n: int, blocks_in: int, blocks_out: int, strided: bool,
    problem: Problem | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """As `_linear`, for Monarch factors."""
    if config is None:
        return ops.monarch_linear(x, w1, w2, bias, n, blocks_in, blocks_out, strided)
    return monarch_launch.linear(x, w1, w2, bias, n, blocks_in, blocks_out, strided, config)


def register() -> None:
    """Add the provider "triton" to the linear ops; calling it again changes nothing."""
    calls: dict[str, Any] = {"bipolar_linear": _linear, "bipolar_linear_a8": _linear_a8}
    for op in (bipolar_linear.LINEAR, bipolar_linear.LINEAR_A8):
        op.register(Provider("triton", op.name, "cuda", "words", supports, calls[op.name], TritonTuning(), late=True, rank=10))
    kv_ops.register()
    nm_ops.register()
    pie.register()
    rotated_launch.register()
    segments_launch.register()
    skip_ops.register()
    lowrank_ops.register()
    tuning = MonarchTritonTuning()
    monarch_linear.LINEAR.register(Provider("triton", "monarch_linear", "cuda", "dense", _monarch_supports, _monarch, tuning, late=True, rank=10))
