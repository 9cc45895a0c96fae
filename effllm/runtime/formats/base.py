"""What every weight format offers: data and maths, no kernels.

A format knows which tensors it stores, the exact value of what is stored, and how many bytes that takes. It works on meta
tensors too, so shapes can be planned without data.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import sympy
import torch
from torch import Tensor


@dataclass
class Packed:
    """One packed weight: the tensors of a format in its canonical layout, and the scalars that explain them.

    `shape` is the dense (out_features, in_features). `attrs` holds JSON values only.
    """

    format: str
    version: int
    shape: tuple[int, int]
    tensors: dict[str, Tensor]
    attrs: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per dense weight, scales included."""
        return 8.0 * self.nbytes / (self.shape[0] * self.shape[1])

    def to(self, device: torch.device | str) -> Packed:
        """The same weight on another device."""
        moved = {k: t.to(device) for k, t in self.tensors.items()}
        return Packed(self.format, self.version, self.shape, moved, dict(self.attrs))


class Format(Protocol):
    """The contract of a file in `runtime/formats/`. A new layout is a new version; old decoders stay."""

    name: str
    version: int
    tensor_names: tuple[str, ...]

    def unpack(self, packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense (N, K) weight that the stored numbers mean, exactly (rounded once to `dtype`)."""
        ...

    def nbytes(self, **attrs: Any) -> sympy.Expr:
        """Stored bytes as an expression over the symbols N and K."""
        ...

    def validate(self, packed: Packed) -> None:
        """Raise CheckpointError where tensors and attributes do not fit together."""
        ...


def error(w: Tensor, w_hat: Tensor) -> dict[str, float]:
    """Relative Frobenius error, largest absolute error and cosine between a dense weight and its packed value."""
    a, b = w.double(), w_hat.double()
    norm = float(a.norm())
    return {
        "rel": float((a - b).norm()) / norm if norm else float((a - b).norm()),
        "max": float((a - b).abs().max()) if a.numel() else 0.0,
        "cosine": float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)) if a.numel() else 1.0,
    }
