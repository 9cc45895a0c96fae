"""Modules that own packed weights: what `effllm.compress` puts in the place of Linear and Embedding.

They work in eager and under any torch.compile backend, through the same ops that the `effllm` backend inserts.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from effllm.runtime.weights.base import PackedWeight


class PackedLinear(nn.Module):
    """Linear with a packed weight: x (..., in_features) to (..., out_features)."""

    def __init__(self, weight: PackedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.out_features, self.in_features = weight.shape
        if bias is None:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """The product in x's dtype."""
        return self.weight.linear(x, self.bias)


class PackedEmbedding(nn.Module):
    """Embedding with a packed weight: ids (...) to (..., embedding_dim)."""

    def __init__(self, weight: PackedWeight, padding_idx: int | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """The rows in the weight's activation dtype."""
        return self.weight.gather(ids)


def packed_weights(model: nn.Module) -> dict[str, PackedWeight]:
    """Every distinct packed weight by its first name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedWeight)}


def summary(model: nn.Module) -> dict[str, Any]:
    """Total bytes and bits per weight of the packed part of a model."""
    weights = packed_weights(model).values()
    count = sum(w.shape[0] * w.shape[1] for w in weights)
    size = sum(w.nbytes for w in weights)
    return {"packed_weights": len(weights), "bytes": size, "bits_per_weight": 8 * size / count if count else 0.0}
