"""Weights composed of matrices that each have a format of their own: low-rank factors, Monarch factors, kept values of N:M.

A part called "a" keeps its tensors under "a.<tensor>" and its format, version, shape and attributes under `attrs["a"]`, so a
composed weight travels through checkpoints like any other, and each part may be dense or quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from effllm.errors import CheckpointError
from effllm.runtime.formats import bipolar
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
    return tuple(key for key, about in packed.attrs.items() if isinstance(about, dict) and "format" in about)


def precision(attrs: Mapping[str, Any]) -> int:
    """Most bits of a quantized part, or of the weight itself; 16 where nothing is quantized."""
    if isinstance(attrs.get("bits"), int):
        return int(attrs["bits"])
    inner = [precision(about["attrs"]) for about in attrs.values() if isinstance(about, Mapping) and isinstance(about.get("attrs"), Mapping)]
    return max((b for b in inner if b < 16), default=16)


def part_bits(attrs: Mapping[str, Any], key: str) -> int:
    """Stored bits of the tensor `key` of a weight: those of its part."""
    prefix, dot, rest = key.partition(".")
    about = attrs.get(prefix)
    return part_bits(about["attrs"], rest) if dot and isinstance(about, Mapping) and isinstance(about.get("attrs"), Mapping) else precision(attrs)


def truncate(packed: Packed, bits: int) -> Packed:
    """The same weight with every bipolar part at its `bits` most significant planes (parts that have no more stay)."""
    if packed.format == bipolar.name:
        return bipolar.truncate(packed, bits) if packed.attrs["bits"] > bits else packed
    shrunk = {key: truncate(part(packed, key), bits) for key in names(packed)}
    own = {name: t for name, t in packed.tensors.items() if name.partition(".")[0] not in shrunk}
    return join(packed.format, packed.version, packed.shape, shrunk, own, {k: v for k, v in packed.attrs.items() if k not in shrunk})
