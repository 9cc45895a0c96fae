"""How a packed weight of each format becomes a node: one module per format with `insert` and `config`."""

from __future__ import annotations

from types import ModuleType

from effllm.errors import PassError, nearest
from effllm.passes.emitters import bipolar

EMITTERS: dict[str, ModuleType] = {"bipolar": bipolar}


def of(format: str) -> ModuleType:
    """The module that inserts weights of a format. Raises PassError."""
    if format not in EMITTERS:
        raise PassError("E-PAS-FORMAT", f"no op for weights of the format {format!r} in a graph", nearest(format, EMITTERS))
    return EMITTERS[format]
