"""Straight-through masked linears: the forward pass sees a masked weight, the gradient reaches every weight.

With a decay d the forward weight is w * (m + (1 - m) d) (Progressive Gradient Flow, arXiv 2402.04744); d = 0 is a hard mask, d = 1 dense.
SR-STE (arXiv 2102.04010) adds coefficient * (1 - m) * w to the gradient, which pulls pruned weights to zero so that masks settle.
No module or parametrization is needed: the dense parameter stays the parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from effllm.solvers.nm.masks import magnitude, nm_mask

SR_STE = 2e-4


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, mask: Tensor, decay: float, pull: float) -> Tensor:
        ctx.pull = pull
        if pull:
            ctx.save_for_backward(w, mask)
        return torch.where(mask, w, w * decay)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        if ctx.pull:
            w, mask = ctx.saved_tensors
            grad = grad + ctx.pull * torch.where(mask, torch.zeros_like(w), w)
        return grad, None, None, None


def masked_weight(w: Tensor, mask: Tensor, *, decay: float = 0.0, pull: float = 0.0) -> Tensor:
    """w (N, K) with pruned values times `decay`; the gradient goes to all of w as if it were dense, plus pull * (1 - mask) * w."""
    out: Tensor = _Masked.apply(w, mask, decay, pull)
    return out


def masked_linear(x: Tensor, w: Tensor, bias: Tensor | None, n: int, m: int, *, decay: float = 0.0, pull: float = 0.0) -> Tensor:
    """x (..., K) through w (N, K) under the n:m magnitude mask of this very step. SR-STE: pull=SR_STE."""
    return functional.linear(x, masked_weight(w, nm_mask(magnitude(w), n, m), decay=decay, pull=pull), bias)
