"""What the kernel benchmark compares: one way to multiply by one weight, with enough copies of the weight to keep caches cold."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

COLD = 64 << 20  # bytes that copies take at least
FACTOR = 2  # a turn over twice the cache leaves nothing of it for the next turn


class Candidate(ABC):
    """A kernel with its weight (N, K) in memory. `load` gives it activations; `run` then calls it, on the next copy each time."""

    name: str
    kind: str = "peer"  # "effllm", "peer" or "torch"
    op: str = ""
    bits: int = 16  # of a weight, scales not counted
    act: str = "bf16"  # what the product itself reads: bf16, fp32 or int8
    version: str = ""
    nbytes: int = 0  # of the packed weight, scales counted: what one call reads
    copies: int = 1
    calls: int = 1  # kernel calls of one `run`
    floor: float = 8e-3  # relative error allowed beside twice that of plain torch
    quality: float = 0.0  # relative error allowed against the dense weight, where `stored` gives None

    @abstractmethod
    def load(self, x: Tensor) -> None:
        """Take activations (M, K) bf16; converts or quantizes them where the kernel wants that done before."""

    @abstractmethod
    def run(self) -> Any:
        """Call the kernel on the next copy (`calls` times on the next ones)."""

    @abstractmethod
    def output(self) -> Tensor:
        """The product (M, N) with copy 0."""

    def stored(self, index: Tensor) -> Tensor | None:
        """Rows `index` of the weight that is really stored, (R, K) fp64; None where the library cannot tell."""
        del index
        return None

    def activations(self, x: Tensor) -> Tensor:
        """The activations that the product means, (M, K) fp64: those given, or their quantized value where that is an input."""
        return x.double()

    def figures(self) -> dict[str, Any]:
        """Further columns of the row: configuration, predicted and least possible time."""
        return {}


class Rotating(Candidate):
    """A candidate whose copies are a list, called one after another by `call(copy, x)`."""

    def __init__(self, weights: list[Any], nbytes: int) -> None:
        self.weights, self.nbytes, self.copies = weights, nbytes, len(weights)
        self._next = 0
        self.x: Any = None

    @abstractmethod
    def call(self, weight: Any, x: Any) -> Tensor:
        """The kernel."""

    def load(self, x: Tensor) -> None:
        """Take the activations as they are."""
        self.x = x

    def run(self) -> Any:
        """Call the next copy."""
        weight = self.weights[self._next]
        self._next = (self._next + 1) % self.copies
        return self.call(weight, self.x)

    def output(self) -> Tensor:
        """The product with copy 0."""
        return self.call(self.weights[0], self.x)


def last_level_cache(device: str) -> int:
    """Bytes of the cache that copies must exceed: the CPU's largest, the GPU's L2; 32 MiB where the system does not say."""
    if device == "cuda":
        return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)) or 32 << 20
    found = [_size(p.read_text().strip()) for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(found, default=32 << 20)


def _size(text: str) -> int:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1]] if text and text[-1] in units else int(text or 0)


def copies(nbytes: int, cache: int, least: int = COLD) -> int:
    """How many copies of a weight of `nbytes` exceed the cache `FACTOR` times; one where a single weight does."""
    return -(-max(least, FACTOR * cache) // max(1, nbytes))
