"""How many bytes of weights a model holds, and how many of them one decode step reads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from effllm.runtime.packed import PackedEmbedding, PackedWeight


@dataclass(frozen=True)
class Size:
    """`read` bytes per decode step, `held` bytes in all, `count` weights behind `read`."""

    read: int
    held: int
    count: int

    @property
    def bits_per_weight(self) -> float:
        """Mean bits of the weights that a decode step reads, scales included."""
        return 8 * self.read / self.count if self.count else 0.0


def weight_size(model: nn.Module) -> Size:
    """Sizes of a model's weights, shared ones counted once.

    A decode step reads every weight once, but only one row of an embedding; an embedding tied to the head is read as the head.
    """
    read: dict[int, tuple[int, int]] = {}
    row: dict[int, tuple[int, int]] = {}
    held: dict[int, int] = {}
    for module in model.modules():
        for key, size, count in _own(module):
            held[key] = size
            if isinstance(module, nn.Embedding | PackedEmbedding):
                rows = int(module.num_embeddings)
                row[key] = (size // rows, count // rows)
            else:
                read[key] = (size, count)
    parts = [*read.values(), *(r for key, r in row.items() if key not in read)]
    return Size(sum(s for s, _ in parts), sum(held.values()), sum(c for _, c in parts))


def _own(module: nn.Module) -> list[tuple[int, int, int]]:
    """(key, bytes, weights) of the weights that a module uses itself."""
    if isinstance(module, PackedWeight):
        return []  # counted where it is used, as linear or as embedding
    weight = getattr(module, "weight", None)
    found = [(id(weight), weight.nbytes, weight.shape[0] * weight.shape[1])] if isinstance(weight, PackedWeight) else []
    return found + [_tensor(p) for p in module.parameters(recurse=False)]


def _tensor(p: Tensor) -> tuple[int, int, int]:
    return id(p), p.numel() * p.element_size(), p.numel()
