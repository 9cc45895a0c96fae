"""The canonical layout of N:M and ARMOR weights: what their reference ops read.

    values   (N, Kc) floating point; or codes, the planes (bits, N, Kcp / 8) of formats/bipolar.py, with scale and minimum
    index    bitmap or packed columns as formats/nm.py
    left, right   (N, d) and (K, d), ARMOR only
"""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.errors import KernelError
from effllm.runtime.formats import armor, bipolar, nm, parts
from effllm.runtime.formats.base import Packed


def core_of(packed: Packed) -> tuple[Packed, dict[str, Tensor]]:
    """The N:M part of an nm or armor weight, and the wrappers' rows of the latter. Raises KernelError (E-KRN-LAYOUT) for other formats."""
    if packed.format == nm.name:
        return packed, {}
    if packed.format == armor.name:
        return parts.part(packed, "core"), {key: parts.part(packed, key).tensors["values"] for key in ("left", "right")}
    raise KernelError("E-KRN-LAYOUT", f"a {packed.format} weight in a layout of N:M weights", "repack it with its own format's layouts")


def repack(packed: Packed) -> dict[str, Tensor]:
    """Rename the canonical tensors."""
    core, wrappers = core_of(packed)
    part = parts.part(core, "values")
    own = dict(part.tensors)
    own["values"] = own.pop("planes") if part.format == bipolar.name else own["values"]
    return own | wrappers | {"index": core.tensors["index"]}


def columns(index: Tensor, n: int, k: int, keep: int, of: int, coded: bool = False) -> Tensor:
    """Columns (N, Kc) of the kept weights."""
    return nm.unpack_index(index, k, keep, of)


def values(stored: Tensor, n: int, k: int, keep: int, of: int) -> Tensor:
    """Kept floating-point weights (N, Kc), differentiable."""
    return stored


def codes(
    stored: Tensor, scale: Tensor, minimum: Tensor | None, *, n: int, k: int, keep: int, of: int, bits: int, group: int
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Unsigned codes (N, Kcp) with scale and minimum (N, G)."""
    return bipolar.unpack_codes(stored), scale, minimum


def wrapper(stored: Tensor) -> Tensor:
    """Blocks (B, d, d) of a wrapper."""
    return armor.blocks(stored)


def bitmap(packed: Packed) -> Tensor:
    """Bool (N, Kp): the columns that an N:M weight stores, padded ones included."""
    cols = nm.columns_of(packed)
    width = nm.padded(packed.shape[1], packed.attrs["m"])
    return torch.zeros(packed.shape[0], width, dtype=torch.bool, device=cols.device).scatter_(1, cols, True)
