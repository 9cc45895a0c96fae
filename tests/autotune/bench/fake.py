"""Fake peers on tiny shapes: one right, one wrong, one that raises, one that is missing."""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.autotune.bench.candidate import Candidate, Rotating
from effllm.autotune.peers.base import Peer, label
from effllm.autotune.shapes import Site

TINY = [Site("tiny", ("q", "o"), 48, 64), Site("tiny", ("head",), 80, 64)]


class Product(Rotating):
    """x @ w.T times a factor, in fp32."""

    factor = 1.0
    timed = 0

    def call(self, weight: Tensor, x: Tensor) -> Tensor:
        self.timed += 1
        return torch.nn.functional.linear(x.float(), weight) * self.factor

    def stored(self, index: Tensor) -> Tensor:
        return self.weights[0][index].double()


class Fake(Peer):
    """A peer around `Product`."""

    package, install = "torch", "pip install fake"

    def __init__(self, name: str, factor: float = 1.0, error: Exception | None = None, package: str = "torch") -> None:
        self.name, self.factor, self.error, self.package = name, factor, error, package
        self.made: list[Product] = []

    def refuses(self, n: int, k: int, group: int) -> str:
        return "N is odd for me" if self.name == "picky" and n == 80 else ""

    def build(self, weight: Tensor, group: int, cache: int) -> Candidate:
        if self.error is not None:
            raise self.error
        made = Product([weight.float(), weight.float()], weight.numel() * 4)
        made.factor = self.factor
        label(made, self, 32, "fp32")
        self.made.append(made)
        return made
