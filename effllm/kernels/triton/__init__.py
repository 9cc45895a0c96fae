"""Triton kernels. Importing this package imports Triton; `effllm.lowering` does so only when a GPU site asks for it.

`register()` adds the provider "triton" to the bipolar linear ops. Nothing here asks for a device before the first call.
"""

from __future__ import annotations

import torch

from effllm.kernels.triton import ops
from effllm.lowering import bipolar_linear
from effllm.lowering.op import YES, Problem, Provider, Verdict
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


def register() -> None:
    """Add the provider "triton" to both linear ops; calling it again changes nothing."""
    bipolar_linear.LINEAR.register(Provider("triton", "bipolar_linear", "cuda", "words", supports, ops.linear, rank=10))
    bipolar_linear.LINEAR_A8.register(Provider("triton", "bipolar_linear_a8", "cuda", "words", supports, ops.linear_a8, rank=10))
