"""Which activations may be dropped: thresholds, their allocation over projections, and splits between columns and a low rank."""

from __future__ import annotations

from effllm.solvers.activation import measured, rsparse, teal, thresholds
from effllm.solvers.activation.histogram import Histogram

__all__ = ["Histogram", "measured", "rsparse", "teal", "thresholds"]
