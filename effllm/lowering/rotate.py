"""Op of rotary embedding (arXiv 2104.09864) with given cosines and sines."""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.lowering.op import Op, define


def turned(x: Tensor, interleaved: bool) -> Tensor:
    """x (..., D) a quarter turn on: pairs are the two halves, or neighbours."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (B, H, S, D) turned by angles whose cosines and sines broadcast to it. Plain torch, for Inductor to fuse."""
    return x * cos + turned(x, interleaved) * sin


ROTATE: Op = define("rotate(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor", rotate, rotate)
