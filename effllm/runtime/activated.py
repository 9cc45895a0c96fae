"""An activation function whose small results become zero: what CATS and CHESS do to the gate of an MLP.

The module takes the place of the model's activation module, whatever the MLP around it looks like. In eager mode the rest of the MLP is
computed as before, on a gate with zeros, which the down projection's kernel skips; in a compiled graph the `sparse_gate` pass also skips
the rows of the up projection.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from effllm.lowering import sparsify as _op  # noqa: F401  defines the op


class ThresholdedActivation(nn.Module):
    """`inner` with results of magnitude up to threshold (N,) at zero, in calls of at most `limit` rows (-1: in all)."""

    threshold: Tensor

    def __init__(self, inner: nn.Module, threshold: Tensor, limit: int, *, method: str = "", target: float = 0.0, realised: float = 0.0) -> None:
        super().__init__()
        self.inner, self.limit = inner, limit
        self.about: dict[str, Any] = {"method": method, "target": target, "realised": realised}
        self.register_buffer("threshold", threshold.detach().float().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """The activation of x (..., N)."""
        y: Tensor = torch.ops.effllm.sparsify(self.inner(x), self.threshold, self.limit)
        return y

    def _apply(self, fn: Any, recurse: bool = True) -> ThresholdedActivation:
        """Moves take the thresholds along; casts leave them fp32, where they were found."""
        before = self.threshold
        super()._apply(fn, recurse)
        if self.threshold.dtype != torch.float32:
            self.threshold = before.to(self.threshold.device)
        return self

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{self.threshold.numel()} thresholds, limit={self.limit}, " + ", ".join(f"{k}={v}" for k, v in self.about.items())
