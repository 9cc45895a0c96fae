"""Modules that own packed weights, one class per format; `make` picks the class."""

from __future__ import annotations

import torch

from effllm.errors import CheckpointError, nearest
from effllm.runtime.formats.base import Packed
from effllm.runtime.weights.base import PackedWeight
from effllm.runtime.weights.bipolar import BipolarWeight
from effllm.runtime.weights.lowrank import LowRankWeight, SparseLowRankWeight
from effllm.runtime.weights.monarch import MonarchWeight
from effllm.runtime.weights.nm import ArmorWeight, NMWeight
from effllm.runtime.weights.thresholded import ThresholdedWeight

_CLASSES: tuple[type[PackedWeight], ...] = (BipolarWeight, LowRankWeight, SparseLowRankWeight, MonarchWeight, NMWeight, ArmorWeight, ThresholdedWeight)
KINDS: dict[str, type[PackedWeight]] = {kind.format: kind for kind in _CLASSES}


def kind_of(format: str) -> type[PackedWeight]:
    """The class that holds weights of a format."""
    if format not in KINDS:
        raise CheckpointError("E-CKP-FORMAT", f"weights of the format {format!r} cannot be used by themselves", nearest(format, KINDS))
    return KINDS[format]


def make(packed: Packed, *, act: str = "a16", dtype: torch.dtype = torch.float32, kernel: str | None = None) -> PackedWeight:
    """The module for a packed weight; see PackedWeight for the arguments."""
    return kind_of(packed.format)(packed, act=act, dtype=dtype, kernel=kernel)


__all__ = ["KINDS", "ArmorWeight", "BipolarWeight", "LowRankWeight", "MonarchWeight", "NMWeight", "PackedWeight", "SparseLowRankWeight",
           "ThresholdedWeight", "kind_of", "make"]  # fmt: skip
