"""The GPU layout: 32-bit words along K, outputs contiguous, so that neighbouring lanes read neighbouring words of one row.

A code of n bits is split into parts of 8, 4, 2 or 1 bits, most significant part first: the binary digits of n, so 3 = 2+1,
5 = 4+1, 6 = 4+2, 7 = 4+2+1. For a part of p bits one word holds 32/p consecutive columns of one output. With c the column within the word:

    bits (c % 2) * 16 + (c // 2) * p   and the p - 1 above     for p = 4:   bit 28   24   20   16   12    8    4    0
                                                                      col   7    5    3    1    6    4    2    0

Columns 2i and 2i + 1 sit at the same place of the low and the high half, so one shift, one AND and one OR turn a word into two
fp16 or bf16 numbers (kernels/triton/fields.py).

    codes    int32  (bits * KB, Np)    KB = ceil(Kp / 32) blocks of 32 columns, Np = N rounded up to 16; the part of p bits with
                                       q bits above it fills rows q * KB to (q + p) * KB - 1; row r of a part: columns r * 32/p ...
    scale    fp16 or fp32  (G, Np)     G = groups of KB * 32 columns
    minimum  as scale, affine only

Padded outputs and groups have scale 0 and minimum 0; padded columns hold code 0 and must meet activation 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effllm.runtime.formats import bipolar
from effllm.runtime.formats.base import Packed
from effllm.runtime.layouts.tile16 import BLOCK, PARTS, blocks, kernel_groups

COLUMNS = 16  # outputs are padded to this, so that every row starts on a 16-byte boundary


def padded_outputs(n: int) -> int:
    """Np: outputs rounded up to whole vectors."""
    return -(-n // COLUMNS) * COLUMNS


def position(column: int, p: int) -> int:
    """The lowest bit of a word's column for parts of p bits."""
    return (column % 2) * 16 + (column // 2) * p


def _transposed(t: Tensor, height: int) -> Tensor:
    """(N, W) to (height, Np), zero padded on both axes."""
    n, w = t.shape
    out = t.new_zeros(height, padded_outputs(n))
    out[:w, :n] = t.t()
    return out


def repack(packed: Packed) -> dict[str, Tensor]:
    """Canonical planes to words."""
    (n, k), bits, group = packed.shape, packed.attrs["bits"], packed.attrs["group"]
    u = bipolar.unpack_codes(packed.tensors["planes"])
    kb, np_ = blocks(k, group), padded_outputs(n)
    full = _transposed(u, kb * BLOCK)
    codes = torch.zeros(bits * kb, np_, dtype=torch.int32, device=u.device)
    below, at = bits, 0
    for p in PARTS[bits]:
        below -= p
        fields = 32 // p
        part = ((full >> below) & (2**p - 1)).view(kb * p, fields, np_)
        target = codes[at : at + kb * p]
        for c in range(fields):
            target |= part[:, c].to(torch.int32) << position(c, p)
        at += kb * p
    g = kernel_groups(k, group)
    result = {"codes": codes, "scale": _transposed(packed.tensors["scale"], g)}
    if "minimum" in packed.tensors:
        result["minimum"] = _transposed(packed.tensors["minimum"], g)
    return result


def decode(codes: Tensor, bits: int) -> Tensor:
    """Words (bits * KB, R) of any outputs to unsigned codes (R, KB * 32), uint8."""
    kb, outputs = codes.shape[0] // bits, codes.shape[1]
    u = torch.zeros(outputs, kb * BLOCK, dtype=torch.uint8, device=codes.device)
    at = 0
    for p in PARTS[bits]:
        words = codes[at : at + kb * p].t()  # (R, rows)
        part = torch.empty(outputs, kb * p, 32 // p, dtype=torch.uint8, device=codes.device)
        for c in range(32 // p):
            part[:, :, c] = ((words >> position(c, p)) & (2**p - 1)).to(torch.uint8)
        u = (u << p) | part.view(outputs, kb * BLOCK)
        at += kb * p
    return u


def restore(tensors: dict[str, Tensor], shape: tuple[int, int], attrs: dict[str, Any]) -> Packed:
    """The inverse of `repack`."""
    (n, k), bits, group = shape, attrs["bits"], attrs["group"]
    u = decode(tensors["codes"][:, :n], bits)[:, : bipolar.padded(k, group)]
    g = bipolar.groups(k, group)
    own = {"planes": bipolar.pack_codes(u.contiguous(), bits)}
    for key in ("scale", "minimum"):
        if key in tensors:
            own[key] = tensors[key][:g, :n].t().contiguous()
    return Packed(bipolar.name, bipolar.version, shape, own, dict(attrs))


def full_rows(codes: Tensor) -> int:
    """Padded outputs of `codes`: those of the weight where they fill whole vectors."""
    return codes.shape[1]


def rows(codes: Tensor, scale: Tensor, minimum: Tensor | None, index: Tensor | None, *, n: int, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Unsigned codes (R, KB * 32) and scales (R, G) of the outputs in `index` (all outputs without it)."""

    def pick(t: Tensor) -> Tensor:
        return t[:, :n] if index is None else t.index_select(1, index)

    return decode(pick(codes), bits), pick(scale).t(), None if minimum is None else pick(minimum).t()


def fake_shapes(shape: tuple[int, int], bits: int, group: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Shapes and dtypes of the tensors for a dense (N, K); dtype None stands for the scale's."""
    n, k = shape
    per_group = (kernel_groups(k, group), padded_outputs(n))
    return {"codes": ((bits * blocks(k, group), padded_outputs(n)), torch.int32), "scale": (per_group, None), "minimum": (per_group, None)}
