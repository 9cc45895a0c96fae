"""Op of RMS normalisation (arXiv 1910.07467), in the two orders of rounding that models use."""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.lowering.op import Op, define


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, late: bool) -> Tensor:
    """x (..., N) over its root mean square, times `offset + weight` (N).

    late: fp32 until the product is made (Gemma); else rounded to x's dtype before it (Llama), and `offset` is 0.
    Plain torch, so that Inductor fuses it where no kernel of ours takes it.
    """
    xf = x.to(torch.float32)
    normed = xf * torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + eps)
    if late:
        return (normed * (offset + weight.float() if offset else weight.float())).to(x.dtype)
    return weight * normed.to(x.dtype)


RMS_NORM: Op = define("rms_norm(Tensor x, Tensor weight, float eps, float offset, bool late) -> Tensor", rms_norm, rms_norm)
