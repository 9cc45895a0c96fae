"""When an op must be differentiable: its composite then decomposes into plain torch ops, which autograd and AOTAutograd know.

Kernels have no gradients. Under `torch.no_grad`, `torch.inference_mode`, or where no operand requires a gradient, they run.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def wanted(*operands: Tensor | Iterable[Tensor] | None) -> bool:
    """Whether autograd records and any of the operands (tensors, lists of them, None) requires a gradient."""
    if not torch.is_grad_enabled():
        return False
    for o in operands:
        if o is None:
            continue
        if o.requires_grad if isinstance(o, Tensor) else any(t.requires_grad for t in o):
            return True
    return False
