"""Weights composed of matrices that each have a format of their own: low-rank factors, Monarch factors, kept values of N:M.

A part called "a" keeps its tensors under "a.<tensor>" and its format, version, shape and attributes under `attrs["a"]`, so a
composed weight travels through checkpoints like any other, and each part may be dense or quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from effllm.errors import CheckpointError
from effllm.runtime.formats.base import Packed


def join(
    format: str, version: int, shape: tuple[int, int], parts: Mapping[str, Packed],
    tensors: Mapping[str, Tensor] | None = None, attrs: Mapping[str, Any] | None = None,
) -> Packed:  # fmt: skip
    """A composed weight with the dense `shape`; `tensors` and `attrs` are what belongs to no part."""
    held = dict(tensors or {})
    about: dict[str, Any] = dict(attrs or {})
    for key, p in parts.items():
        held |= {f"{key}.{name}": t for name, t in p.tensors.items()}
        about[key] = {"format": p.format, "version": p.version, "shape": list(p.shape), "attrs": dict(p.attrs)}
    return Packed(format, version, shape, held, about)


def part(packed: Packed, key: str) -> Packed:
    """One part by its name. Raises CheckpointError (E-CKP-SHAPE) where the weight has no such part."""
    about = packed.attrs.get(key)
    if not isinstance(about, dict) or not {"format", "version", "shape", "attrs"} <= about.keys():
        raise CheckpointError("E-CKP-SHAPE", f"{packed.format} weight: it has no part {key!r}", "the file is damaged or not from effllm; write it again")
    prefix = f"{key}."
    tensors = {name.removeprefix(prefix): t for name, t in packed.tensors.items() if name.startswith(prefix)}
    n, k = about["shape"]
    return Packed(str(about["format"]), int(about["version"]), (n, k), tensors, dict(about["attrs"]))


def names(packed: Packed) -> tuple[str, ...]:
    """The names of all parts."""
    return tuple(dict.fromkeys(name.partition(".")[0] for name in packed.tensors if "." in name))
