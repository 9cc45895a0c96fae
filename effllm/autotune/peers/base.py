"""What an adapter to another library's kernel offers: whether it is here, which shapes it takes, and a candidate made from a weight."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from abc import ABC, abstractmethod

from torch import Tensor

from effllm.autotune.bench.candidate import Candidate

# what a foreign library may raise where it does not fit; the row says "failed" with its message
ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, ImportError, LookupError, OSError, AssertionError, MemoryError)


class Peer(ABC):
    """One kernel of one library."""

    name: str
    package: str  # to import
    distribution: str = ""  # to ask for a version, where it is not the package's name
    install: str  # what to type where it is missing
    devices: tuple[str, ...] = ("cpu", "cuda")

    def missing(self, device: str) -> str:
        """Why it cannot run on a device type here; empty where it can."""
        if device not in self.devices:
            return f"{self.package} has no such kernel on {device}"
        if importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        return ""

    def version(self) -> str:
        """Of the installed library."""
        try:
            return importlib.metadata.version(self.distribution or self.package)
        except importlib.metadata.PackageNotFoundError:
            return "unknown"

    def refuses(self, n: int, k: int, group: int) -> str:
        """Why it does not take a weight (N, K) at this group size; empty where it does."""
        del n, k, group
        return ""

    @abstractmethod
    def build(self, weight: Tensor, group: int, cache: int) -> Candidate:
        """Quantize a weight (N, K) bf16, in as many copies as exceed `cache` bytes. May raise any of ERRORS."""


def label(candidate: Candidate, peer: Peer, bits: int, act: str) -> None:
    """Write the peer's names into a candidate."""
    candidate.name, candidate.version, candidate.bits, candidate.act = peer.name, peer.version(), bits, act
