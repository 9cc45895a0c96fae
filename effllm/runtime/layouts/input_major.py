"""Codes by input channel, for kernels that skip inputs: the codes of one channel, packed along the outputs, are contiguous bytes.

Codes are stored 4 or 8 bits wide (`width`: the next of these). A unit of 64 bytes holds 512 / width outputs of one channel; with
per = 8 / width codes in a byte,

    bits j * width .. of byte 16 q + 4 r + i of unit u   hold the code of output u * 512 / width + 16 * (r * per + j) + 4 q + i

so that four channels, interleaved byte by byte within 16 bytes, give registers of 16 consecutive outputs times four channels.

    codes    uint8  (K, U, 64)       U = ceil(N * width / 512)
    scale    fp16 or fp32  (G, Np)   groups along K, Np = U * 512 / width; padding is 0
    minimum  as scale, affine only
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effllm.runtime.formats import bipolar
from effllm.runtime.formats.base import Packed

UNIT = 64  # bytes


def width_of(bits: int) -> int:
    """Stored bits of a code."""
    return next(w for w in (4, 8) if bits <= w)


def units(n: int, bits: int) -> int:
    """Units of a channel."""
    return -(-n * width_of(bits) // 512)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes (R, C) to units (R, U, 64)."""
    width, (count, n) = width_of(bits), codes.shape
    u = units(n, bits)
    full = codes.new_zeros(count, u * (512 // width), dtype=torch.uint8)
    full[:, :n] = codes
    per = 8 // width  # codes in a byte
    fields = full.view(count, u, 4, per, 4, 4)  # r, j, q, i
    shift = (torch.arange(per, device=codes.device) * width).to(torch.uint8).view(per, 1, 1)
    return (fields << shift).sum(3, dtype=torch.uint8).transpose(2, 3).reshape(count, u, UNIT)


def decode(codes: Tensor, bits: int, n: int) -> Tensor:
    """Units (R, U, 64) to unsigned codes (R, n)."""
    width, (count, u, _) = width_of(bits), codes.shape
    shift = (torch.arange(8 // width, device=codes.device) * width).to(torch.uint8).view(-1, 1, 1)
    fields = (codes.view(count, u, 4, 4, 4).transpose(2, 3).unsqueeze(3) >> shift) & (2**width - 1)
    return fields.reshape(count, -1)[:, :n]


def repack(packed: Packed) -> dict[str, Tensor]:
    """Canonical planes to input channels."""
    (n, k), bits = packed.shape, packed.attrs["bits"]
    out = {"codes": pack(bipolar.unpack_codes(packed.tensors["planes"])[:, :k].t(), bits)}
    full = units(n, bits) * (512 // width_of(bits))
    for key in ("scale", "minimum"):
        if key in packed.tensors:
            t = packed.tensors[key]
            out[key] = t.new_zeros(t.shape[1], full)
            out[key][:, :n] = t.t()
    return out


def restore(tensors: dict[str, Tensor], shape: tuple[int, int], attrs: dict[str, Any]) -> Packed:
    """The inverse of `repack`; codes past K come back as 0."""
    (n, k), bits = shape, attrs["bits"]
    full = tensors["codes"].new_zeros(n, bipolar.padded(k, attrs["group"]))
    full[:, :k] = decode(tensors["codes"], bits, n).t()
    own = {"planes": bipolar.pack_codes(full, bits)}
    own |= {key: tensors[key][:, :n].t().contiguous() for key in ("scale", "minimum") if key in tensors}
    return Packed(bipolar.name, bipolar.version, shape, own, dict(attrs))


def weight(codes: Tensor, scale: Tensor, minimum: Tensor | None, *, n: int, bits: int, group: int, zero: float) -> Tensor:
    """The dense fp32 (K, N) weight behind packed tensors: 2 * scale * (u - zero), or 2 * scale * u + minimum."""
    u = decode(codes, bits, n).float()
    k = u.shape[0]

    def spread(t: Tensor) -> Tensor:  # (G, Np) to (K, N)
        return t[:, :n].float().repeat_interleave(group or k, 0)[:k]

    return 2.0 * spread(scale) * (u - zero) if minimum is None else 2.0 * spread(scale) * u + spread(minimum)


def fake_shapes(shape: tuple[int, int], bits: int, group: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Shapes and dtypes of the tensors for a dense (N, K); dtype None stands for the scale's."""
    (n, k), full = shape, units(shape[0], bits) * (512 // width_of(bits))
    g = bipolar.groups(k, group)
    return {"codes": ((k, units(n, bits), UNIT), torch.uint8), "scale": ((g, full), None), "minimum": ((g, full), None)}
