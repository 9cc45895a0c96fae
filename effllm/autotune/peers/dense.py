"""torch's own linear, bf16 and fp32: what a rewrite has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.autotune.bench.candidate import Candidate, Rotating, copies
from effllm.autotune.peers.base import Peer, label


class Linear(Rotating):
    """torch.nn.functional.linear, eager."""

    kind = "torch"

    def __init__(self, weight: Tensor, cache: int) -> None:
        nbytes = weight.numel() * weight.element_size()
        super().__init__([weight] + [weight.clone() for _ in range(copies(nbytes, cache) - 1)], nbytes)

    def load(self, x: Tensor) -> None:
        """Take the activations in the weight's dtype."""
        self.x = x.to(self.weights[0].dtype)

    def call(self, weight: Tensor, x: Tensor) -> Tensor:
        """One product."""
        return torch.nn.functional.linear(x, weight)

    def stored(self, index: Tensor) -> Tensor:
        """The weight itself."""
        return self.weights[0][index].double()


class Torch(Peer):
    """torch in one dtype."""

    package, install = "torch", "pip install torch"

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype

    def build(self, weight: Tensor, group: int, cache: int) -> Candidate:
        """The weight in this dtype."""
        del group
        made = Linear(weight.to(self.dtype), cache)
        label(made, self, 8 * self.dtype.itemsize, "fp32" if self.dtype == torch.float32 else "bf16")
        return made


PEERS: tuple[Peer, ...] = (Torch("torch-bf16", torch.bfloat16), Torch("torch-fp32", torch.float32))
