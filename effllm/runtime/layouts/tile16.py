"""The CPU layout: tiles of 16 rows by 32 columns, so that a 512-bit register holds 4 columns of 16 rows for a byte dot product.

A code of n bits is split into parts of 8, 4, 2 or 1 bits, most significant part first (3 = 2+1, 5 = 4+1, 6 = 4+2, 7 = 4+2+1).
For one tile of 16 rows and one block of 32 columns a part of p bits takes p units of 64 bytes:

    unit q, row r, byte i (0..3), field f (0 .. 8/p - 1, at bits f*p of the byte)   holds column k = q*32/p + 4*f + i

so that masking one field of a unit yields 16 rows x 4 consecutive columns as bytes, what vpdpbusd takes.

    codes    uint8  (T, KB, 64 * bits)    T = ceil(N / 16), KB = ceil(Kp / 32); the parts of a block lie one after another
    scale    fp16 or fp32  (T, GB, 16)    GB = groups per padded row (padding scales are 0)
    minimum  as scale, affine only

Rows past N and columns past K hold code 0 with scale 0 (rows) or meet activation 0 (columns).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effllm.runtime.formats import bipolar
from effllm.runtime.formats.base import Packed

ROWS, BLOCK = 16, 32
_AT_ONCE = 2048  # rows
PARTS: dict[int, tuple[int, ...]] = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def blocks(k: int, group: int) -> int:
    """Blocks of 32 columns in a padded row."""
    return -(-bipolar.padded(k, group) // BLOCK)


def kernel_groups(k: int, group: int) -> int:
    """Groups in a row padded to whole blocks."""
    return 1 if group == bipolar.CHANNEL else max(bipolar.groups(k, group), blocks(k, group) * BLOCK // group)


def _tile_rows(t: Tensor, width: int) -> Tensor:
    """(N, W) to (T, width, 16), zero padded on both axes."""
    n, w = t.shape
    tiles = -(-n // ROWS)
    full = t.new_zeros(tiles * ROWS, width)
    full[:n, :w] = t
    return full.view(tiles, ROWS, width).transpose(1, 2).contiguous()


def _tiles(u: Tensor, out: Tensor, bits: int) -> None:
    """Codes (R, Kp) into tiles (T, KB, bits, 16) of int32."""
    tiles, kb, *_ = out.shape
    full = u
    if u.shape != (tiles * ROWS, kb * BLOCK):
        full = u.new_zeros(tiles * ROWS, kb * BLOCK)
        full[: u.shape[0], : u.shape[1]] = u
    fours = full.contiguous().view(torch.int32).view(tiles, ROWS, kb, BLOCK // 4)  # codes of four columns each, shifted side by side
    below, at = bits, 0
    for p in PARTS[bits]:
        below -= p
        part = fours if p == 8 else (fours >> below) & (2**p - 1) * 0x01010101
        fields = part.view(tiles, ROWS, kb, p, 8 // p).unbind(-1)
        unit = fields[0]
        for f, more in enumerate(fields[1:], 1):
            unit = unit | more << f * p
        out[:, :, at : at + p] = unit.permute(0, 2, 3, 1)
        at += p


def repack(packed: Packed) -> dict[str, Tensor]:
    """Canonical planes to tiles."""
    (n, k), bits, group = packed.shape, packed.attrs["bits"], packed.attrs["group"]
    planes = packed.tensors["planes"]
    tiles, kb = -(-n // ROWS), blocks(k, group)
    out = torch.empty(tiles, kb, bits, ROWS, dtype=torch.int32, device=planes.device)
    for first in range(0, n, _AT_ONCE):  # a head's codes side by side take several times its packed bytes
        _tiles(bipolar.unpack_codes(planes[:, first : first + _AT_ONCE]), out[first // ROWS : -(-min(n, first + _AT_ONCE) // ROWS)], bits)
    out = out.view(torch.uint8).view(tiles, kb, 64 * bits)
    g = kernel_groups(k, group)
    result = {"codes": out, "scale": _tile_rows(packed.tensors["scale"], g)}
    if "minimum" in packed.tensors:
        result["minimum"] = _tile_rows(packed.tensors["minimum"], g)
    return result


def decode(codes: Tensor, bits: int) -> Tensor:
    """Tiles (..., KB, 64 * bits) of whole rows to unsigned codes (..., 16, KB * 32)."""
    *lead, kb, _ = codes.shape
    u = torch.zeros(*lead, ROWS, kb * BLOCK, dtype=torch.uint8, device=codes.device)
    at = 0
    for p in PARTS[bits]:
        fields = 8 // p
        unit = codes[..., at : at + 64 * p].reshape(*lead, kb, p, ROWS, 4)
        shift = (torch.arange(fields, device=codes.device) * p).to(torch.uint8)
        part = (unit.unsqueeze(-1) >> shift) & (2**p - 1)  # (..., KB, unit, row, byte, field)
        b = len(lead)
        part = part.permute(*range(b), b + 2, b, b + 1, b + 4, b + 3).reshape(*lead, ROWS, kb * BLOCK)
        u = (u << p) | part
        at += 64 * p
    return u


def restore(tensors: dict[str, Tensor], shape: tuple[int, int], attrs: dict[str, Any]) -> Packed:
    """The inverse of `repack`."""
    (n, k), bits, group = shape, attrs["bits"], attrs["group"]
    u = decode(tensors["codes"], bits).reshape(-1, tensors["codes"].shape[1] * BLOCK)[:n, : bipolar.padded(k, group)]
    g = bipolar.groups(k, group)
    own = {"planes": bipolar.pack_codes(u, bits)}
    for key in ("scale", "minimum"):
        if key in tensors:
            own[key] = tensors[key].transpose(1, 2).reshape(-1, tensors[key].shape[1])[:n, :g].contiguous()
    return Packed(bipolar.name, bipolar.version, shape, own, dict(attrs))


def full_rows(codes: Tensor) -> int:
    """Rows of the tiles of `codes`: those of the weight where its tiles are full."""
    return codes.shape[0] * 16


def rows(codes: Tensor, scale: Tensor, minimum: Tensor | None, index: Tensor | None, *, n: int, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Unsigned codes (R, KB * 32) and scales (R, GB) of the rows in `index` (all rows without it)."""
    if index is None:
        u = decode(codes, bits).reshape(-1, codes.shape[1] * BLOCK)[:n]
        flat = [None if t is None else t.transpose(1, 2).reshape(-1, t.shape[1])[:n] for t in (scale, minimum)]
        assert flat[0] is not None
        return u, flat[0], flat[1]
    tile, lane = index // ROWS, index % ROWS
    at, kb = 0, codes.shape[1]
    u = torch.zeros(index.shape[0], kb * BLOCK, dtype=torch.uint8, device=codes.device)
    for p in PARTS[bits]:
        unit = codes.view(codes.shape[0], kb, bits, ROWS, 4)[tile, :, at : at + p, lane]  # (R, KB, unit, byte)
        # scalar shifts: a broadcast shift has no meta kernel for symbolic R
        part = torch.stack([(unit >> f * p) & (2**p - 1) for f in range(8 // p)], -2)  # (R, KB, unit, field, byte)
        u = (u << p) | part.reshape(index.shape[0], kb * BLOCK)
        at += p
    return u, scale[tile, :, lane], None if minimum is None else minimum[tile, :, lane]


def fake_shapes(shape: tuple[int, int], bits: int, group: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Shapes and dtypes of the tensors for a dense (N, K); dtype None stands for the scale's."""
    n, k = shape
    tiles, g = -(-n // ROWS), kernel_groups(k, group)
    return {"codes": ((tiles, blocks(k, group), 64 * bits), torch.uint8), "scale": ((tiles, g, ROWS), None), "minimum": ((tiles, g, ROWS), None)}
