"""The CPU layout of any N:M pattern: rows as they are, a bitmap in words of 64 columns (kernels/cpu/nm_rows.h).

    values   (N, Kc) floating point; or codes uint8 (N, C), one byte each above 4 bits, else two to a byte, the first in the low nibble
    scale    fp16 or fp32  (N, G) along the compressed axis, minimum likewise
    index    uint8  (N, 8 W), W = ceil(Kp / 64); bit k % 8 of byte k // 8; bits past Kp are 0
    left     bf16  (N / d, d / 16, d / 2, 16, 2) ARMOR's blocks: row tile, pair of columns, row, column of the pair; right likewise
"""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.runtime.formats import armor, bipolar, nm, parts
from effllm.runtime.formats.base import Packed
from effllm.runtime.layouts import nm_plain

WORD = 64


def pair_blocks(rows: Tensor) -> Tensor:
    """Rows (R, d) of a block-diagonal matrix in the order of the block kernel."""
    d = rows.shape[1]
    tiles = armor.blocks(rows).to(torch.bfloat16).view(-1, d // 16, 16, d // 2, 2)
    return tiles.transpose(2, 3).contiguous()


def repack(packed: Packed) -> dict[str, Tensor]:
    """Canonical tensors to rows. Blocks of a size that is no multiple of 16 have no such layout (the kernels refuse them)."""
    core, wrappers = nm_plain.core_of(packed)
    part = parts.part(core, "values")
    keep = nm_plain.bitmap(core)
    out = {key: pair_blocks(t) for key, t in wrappers.items()}
    out["index"] = nm.pack_bits(torch.nn.functional.pad(keep, (0, -keep.shape[1] % WORD)))
    if part.format != bipolar.name:
        return out | {"values": part.tensors["values"]}
    u = bipolar.unpack_codes(part.tensors["planes"])
    if part.attrs["bits"] <= 4:
        u = u[:, ::2] | u[:, 1::2] << 4
    return out | {"values": u.contiguous()} | {key: part.tensors[key] for key in ("scale", "minimum") if key in part.tensors}


def columns(index: Tensor, n: int, k: int, keep: int, of: int, coded: bool = False) -> Tensor:
    """Columns (N, Kc) of the kept weights."""
    bits = nm.unpack_bits(index, nm.padded(k, of)).view(n, -1, of)
    place = bits.to(torch.int64).argsort(dim=-1, descending=True, stable=True)[..., :keep]
    return (place + torch.arange(bits.shape[1], device=index.device).view(1, -1, 1) * of).reshape(n, -1)


def values(stored: Tensor, n: int, k: int, keep: int, of: int) -> Tensor:
    """Kept floating-point weights (N, Kc), differentiable."""
    return stored


def codes(
    stored: Tensor, scale: Tensor, minimum: Tensor | None, *, n: int, k: int, keep: int, of: int, bits: int, group: int
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Unsigned codes (N, Kcp) with scale and minimum (N, G)."""
    u = stored if bits > 4 else torch.stack([stored & 15, stored >> 4], -1).reshape(n, -1)
    return u, scale, minimum


def wrapper(stored: Tensor) -> Tensor:
    """Blocks (B, d, d) of a wrapper."""
    blocks, tiles, pairs = stored.shape[:3]
    return stored.transpose(2, 3).reshape(blocks, tiles * 16, pairs * 2)
