"""Weight formats. Look one up by name with `get`; every module here follows `base.Format`."""

from __future__ import annotations

from types import ModuleType

from effllm.errors import CheckpointError, nearest
from effllm.runtime.formats import armor, bipolar, dense, lowrank, monarch, nm, sltrain, thresholded

FORMATS: dict[str, ModuleType] = {f.name: f for f in (armor, bipolar, dense, lowrank, monarch, nm, sltrain, thresholded)}


def get(name: str) -> ModuleType:
    """The format module called `name`."""
    if name not in FORMATS:
        raise CheckpointError("E-CKP-FORMAT", f"unknown weight format {name!r}", nearest(name, FORMATS))
    return FORMATS[name]
