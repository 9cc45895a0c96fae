"""Tuning results travel with torch's own compile caches.

What this process measured or used is recorded as an artifact of type TYPE, so that `torch.compiler.save_cache_artifacts()` carries it
beside Inductor's entries; `torch.compiler.load_cache_artifacts()` in a process that has imported effllm merges it into the store of
the default directory. An artifact's content is the measurement's line.
"""

from __future__ import annotations

import hashlib
import warnings

from effllm import compat
from effllm.autotune.measurement import LineError, Measurement, decode, encode
from effllm.errors import TuneError

TYPE = compat.TUNING_ARTIFACT


def unavailable() -> str:
    """Why entries do not travel with torch's caches; empty where they do."""
    return compat.artifact_problem(TYPE)


def record(measurement: Measurement) -> None:
    """Let the next `save_cache_artifacts` carry the measurement; does nothing where `unavailable` gives a reason."""
    line = encode(measurement)
    compat.record_artifact(TYPE, f"{measurement.key.op}-{hashlib.sha256(line).hexdigest()[:16]}", line)


def load(key: str, content: bytes) -> None:
    """Merge one artifact into the default store. What cannot be used or written is warned about, so that the other caches still load."""
    from effllm.autotune.store import open_store

    try:
        open_store().merge([decode(content)])
    except LineError as error:
        warnings.warn(f"effllm: the tuning artifact {key} is skipped: {error}", stacklevel=2)
    except TuneError as error:
        warnings.warn(f"effllm: the tuning artifact {key} is not kept: {error}", stacklevel=2)
