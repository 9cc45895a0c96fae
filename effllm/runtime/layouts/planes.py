"""The canonical layout itself: bit planes (bits, N, Kp / 8), scale (N, G). What the reference reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effllm.runtime.formats import bipolar
from effllm.runtime.formats.base import Packed


def repack(packed: Packed) -> dict[str, Tensor]:
    """Rename the canonical tensors."""
    out = {"codes": packed.tensors["planes"], "scale": packed.tensors["scale"]}
    if "minimum" in packed.tensors:
        out["minimum"] = packed.tensors["minimum"]
    return out


def restore(tensors: dict[str, Tensor], shape: tuple[int, int], attrs: dict[str, Any]) -> Packed:
    """The inverse of `repack`."""
    own = {"planes": tensors["codes"], "scale": tensors["scale"]}
    if "minimum" in tensors:
        own["minimum"] = tensors["minimum"]
    return Packed(bipolar.name, bipolar.version, shape, own, dict(attrs))


def rows(codes: Tensor, scale: Tensor, minimum: Tensor | None, index: Tensor | None, *, n: int, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Unsigned codes (R, Kp) and scales (R, G) of the rows in `index` (all rows without it)."""
    if index is None:
        return bipolar.unpack_codes(codes), scale, minimum
    picked = None if minimum is None else minimum[index]
    return bipolar.unpack_codes(codes.index_select(1, index)), scale[index], picked


def fake_shapes(shape: tuple[int, int], bits: int, group: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Shapes and dtypes of the tensors for a dense (N, K); dtype None stands for the scale's."""
    n, k = shape
    g = bipolar.groups(k, group)
    return {"codes": ((bits, n, bipolar.padded(k, group) // 8), torch.uint8), "scale": ((n, g), None), "minimum": ((n, g), None)}
