"""Codes by output row, for kernels that skip outputs: the codes of one row are contiguous bytes.

Codes are stored 4 or 8 bits wide (see input_major). A unit of 64 bytes holds 512 / width columns of a row:

    bits j * width .. of byte b of unit u   hold the code of column u * 512 / width + 64 * j + b

    codes    uint8  (N, U, 64)      U = ceil(K * width / 512)
    scale    fp16 or fp32  (N, G)   as in the canonical layout
    minimum  as scale, affine only
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effllm.runtime.formats import bipolar
from effllm.runtime.formats.base import Packed
from effllm.runtime.layouts.input_major import UNIT, units, width_of


def pack(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes (N, K) to units (N, U, 64)."""
    width, (n, k) = width_of(bits), codes.shape
    u, per = units(k, bits), 8 // width
    full = codes.new_zeros(n, u * (512 // width), dtype=torch.uint8)
    full[:, :k] = codes
    shift = (torch.arange(per, device=codes.device) * width).to(torch.uint8).view(per, 1)
    return (full.view(n, u, per, UNIT) << shift).sum(2, dtype=torch.uint8)


def decode(codes: Tensor, bits: int, k: int) -> Tensor:
    """Units (N, U, 64) to unsigned codes (N, k)."""
    width = width_of(bits)
    shift = (torch.arange(8 // width, device=codes.device) * width).to(torch.uint8).view(-1, 1)
    return ((codes.unsqueeze(2) >> shift) & (2**width - 1)).reshape(codes.shape[0], -1)[:, :k]


def repack(packed: Packed) -> dict[str, Tensor]:
    """Canonical planes to rows."""
    codes = bipolar.unpack_codes(packed.tensors["planes"])[:, : packed.shape[1]]
    return {"codes": pack(codes, packed.attrs["bits"])} | {key: packed.tensors[key] for key in ("scale", "minimum") if key in packed.tensors}


def restore(tensors: dict[str, Tensor], shape: tuple[int, int], attrs: dict[str, Any]) -> Packed:
    """The inverse of `repack`; codes past K come back as 0."""
    (n, k), bits = shape, attrs["bits"]
    full = tensors["codes"].new_zeros(n, bipolar.padded(k, attrs["group"]))
    full[:, :k] = decode(tensors["codes"], bits, k)
    own = {"planes": bipolar.pack_codes(full, bits)} | {key: tensors[key] for key in ("scale", "minimum") if key in tensors}
    return Packed(bipolar.name, bipolar.version, shape, own, dict(attrs))


def weight(codes: Tensor, scale: Tensor, minimum: Tensor | None, *, k: int, bits: int, group: int, zero: float) -> Tensor:
    """The dense fp32 (N, K) weight behind packed tensors."""
    u = decode(codes, bits, k).float()

    def spread(t: Tensor) -> Tensor:  # (N, G) to (N, K)
        return t.float().repeat_interleave(group or k, 1)[:, :k]

    return 2.0 * spread(scale) * (u - zero) if minimum is None else 2.0 * spread(scale) * u + spread(minimum)


def fake_shapes(shape: tuple[int, int], bits: int, group: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Shapes and dtypes of the tensors for a dense (N, K); dtype None stands for the scale's."""
    n, k = shape
    g = bipolar.groups(k, group)
    return {"codes": ((n, units(k, bits), UNIT), torch.uint8), "scale": ((n, g), None), "minimum": ((n, g), None)}
