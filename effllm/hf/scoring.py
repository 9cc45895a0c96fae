"""fp32 copies of models for scoring, where the processor multiplies fp32 several times as fast as the models' own 16 bits."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from effllm import compat
from effllm.autotune import machine
from effllm.hf.size import weight_size

IN_FP32 = "fp32 copies of the same weights: this processor has no products of 16 bits, which take several times as long"


def for_scoring(models: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The models to score in the place of these, and why they are others (None where they are the same).

    16-bit models on a processor without products of 16 bits are copied in fp32; packed weights stay as they are, activations and what is dense become
    fp32. All models or none, so that they stay comparable, and only where the copies fit into half of the free memory. One object under
    two names is copied once.
    """
    distinct = {id(m): m for m in models.values()}
    room = machine.available_memory() // 2
    if not all(_slow(m) for m in distinct.values()) or 2 * sum(weight_size(m).held for m in distinct.values()) > room:
        return dict(models), None
    copies = {key: copy.deepcopy(m).float() for key, m in distinct.items()}
    return {name: copies[id(m)] for name, m in models.items()}, IN_FP32


def _slow(model: Any) -> bool:
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    return bool(compat.slow_dtype(model.dtype, device))
