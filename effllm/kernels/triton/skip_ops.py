"""The graph ops `effllm_triton::skip_*`, opaque to the compiler so that the dispatch on rows stays inside, and the providers over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effllm.kernels.triton import skip_launch as launch
from effllm.lowering import sparse_bipolar_linear as coded
from effllm.lowering import sparse_linear as dense
from effllm.lowering.op import OPS, YES, Problem, Provider, Verdict
from effllm.runtime.formats import bipolar

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LAYOUTS = {
    "sparse_linear": "dense", "sparse_up_linear": "dense", "rsparse_linear": "dense", "sparse_bipolar_linear": "input_major",
    "sparse_up_bipolar_linear": "row_major",
}  # fmt: skip


@torch.library.custom_op("effllm_triton::skip_input", mutates_args=(), device_types="cuda")
def skip_input(x: Tensor, threshold: Tensor, weight_t: Tensor, bias: Tensor | None, limit: int) -> Tensor:
    """sparse_linear."""
    if not launch.few(x, limit):
        return dense.sparse_linear_torch(x, threshold, weight_t, bias, limit)
    return launch.by_input(x, threshold, None, weight_t.contiguous(), None, None, None, None, bias, n=weight_t.shape[1])


@torch.library.custom_op("effllm_triton::skip_rest", mutates_args=(), device_types="cuda")
def skip_rest(x: Tensor, threshold: Tensor, colnorm: Tensor, weight_t: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, limit: int) -> Tensor:
    """rsparse_linear."""
    if not launch.few(x, limit):
        return dense.rsparse_linear_torch(x, threshold, colnorm, weight_t, u, v, bias, limit)
    return launch.by_input(x, threshold, colnorm, weight_t.contiguous(), None, None, u.contiguous(), v.contiguous(), bias, n=weight_t.shape[1])


@torch.library.custom_op("effllm_triton::skip_output", mutates_args=(), device_types="cuda")
def skip_output(x: Tensor, gate: Tensor, threshold: Tensor, weight: Tensor, bias: Tensor | None, limit: int) -> Tensor:
    """sparse_up_linear."""
    if not launch.few(x, limit):
        return dense.sparse_up_linear_torch(x, gate, threshold, weight, bias, limit)
    return launch.by_output(x, gate, threshold, weight.contiguous(), None, None, bias)


@torch.library.custom_op("effllm_triton::skip_input_codes", mutates_args=(), device_types="cuda")
def skip_input_codes(
    x: Tensor, threshold: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor | None, bias: Tensor | None, n: int, bits: int, group: int, zero: float,
    limit: int,
) -> Tensor:  # fmt: skip
    """sparse_bipolar_linear."""
    if not launch.few(x, limit):
        return coded.sparse_bipolar_linear_torch(x, threshold, codes, scale, minimum, bias, n, bits, group, zero, limit)
    return launch.by_input(x, threshold, None, codes, scale, minimum, None, None, bias, n=n, bits=bits, group=group, zero=zero)


@torch.library.custom_op("effllm_triton::skip_output_codes", mutates_args=(), device_types="cuda")
def skip_output_codes(
    x: Tensor, gate: Tensor, threshold: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor | None, bias: Tensor | None, bits: int, group: int, zero: float,
    limit: int,
) -> Tensor:  # fmt: skip
    """sparse_up_bipolar_linear."""
    if not launch.few(x, limit):
        return coded.sparse_up_bipolar_linear_torch(x, gate, threshold, codes, scale, minimum, bias, bits, group, zero, limit)
    return launch.by_output(x, gate, threshold, codes, scale, minimum, bias, bits=bits, group=group, zero=zero)


@skip_input.register_fake
def _(x, threshold, weight_t, bias, limit):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], weight_t.shape[1])


@skip_rest.register_fake
def _(x, threshold, colnorm, weight_t, u, v, bias, limit):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], weight_t.shape[1])


@skip_output.register_fake
def _(x, gate, threshold, weight, bias, limit):  # type: ignore[no-untyped-def]
    return x.new_empty(gate.shape)


@skip_input_codes.register_fake
def _(x, threshold, codes, scale, minimum, bias, n, bits, group, zero, limit):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], n)


@skip_output_codes.register_fake
def _(x, gate, threshold, codes, scale, minimum, bias, bits, group, zero, limit):  # type: ignore[no-untyped-def]
    return x.new_empty(gate.shape)


def supports(problem: Problem) -> Verdict:
    """Whether the Triton kernels take a problem of activation sparsity."""
    if problem.dtype not in _DTYPES:
        return Verdict(False, f"activations of {problem.dtype}, the kernels take fp16, bf16 and fp32")
    if problem.bits and problem.group not in (bipolar.CHANNEL, *bipolar.GROUPS):
        return Verdict(False, f"groups of {problem.group}, the kernels read {bipolar.GROUPS} or whole channels")
    if max(problem.n, problem.k) >= 2**24:
        return Verdict(False, "a side of 2^24 or more, past the kernels' 32-bit offsets")
    return YES


def register() -> None:
    """Add the provider "triton" to the ops of activation sparsity; calling it again changes nothing."""
    calls: dict[str, Any] = {
        "sparse_linear": skip_input, "sparse_up_linear": skip_output, "rsparse_linear": skip_rest, "sparse_bipolar_linear": skip_input_codes,
        "sparse_up_bipolar_linear": skip_output_codes,
    }  # fmt: skip
    for name, call in calls.items():
        OPS[name].register(Provider("triton", name, "cuda", LAYOUTS[name], supports, call, rank=10))
