"""Op of gated linear units (arXiv 2002.05202): an activation of the gate times the other half."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from effllm.lowering.op import Op, define

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.nn.functional.relu,
}


def glu(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """act(gate) * up, both (..., N); `act` is a key of ACTIVATIONS. Plain torch, for Inductor to fuse where no kernel of ours takes it."""
    return ACTIVATIONS[act](gate) * up


GLU: Op = define("glu(Tensor gate, Tensor up, str act) -> Tensor", glu, glu)
