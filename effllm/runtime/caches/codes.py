"""Codes of few bits, 16 rows by 4 columns to 64 bytes: the order in which byte dot products of 16 lanes read them.

With F = 8 / bits fields a byte, `codes` (R, C) become (R / 16, C / (4 F), 64) bytes: byte 4 r + i of block (a, j) holds, at bit
bits * f, the code of row 16 a + r and column 4 (F j + f) + i. Keys are packed with tokens as rows, values with channels as rows, so that
both products of attention add up along columns. Also the asymmetric quantizer of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 (..., R / 16, C / (4 F), 64) of codes (..., R, C) below 2^bits; R a multiple of 16, C of 4 F."""
    *lead, r, c = codes.shape
    f = 8 // bits
    blocks = codes.to(torch.uint8).reshape(*lead, r // 16, 16, c // (4 * f), f, 4).movedim(-4, -3)  # a j r f i
    out = blocks[..., 0, :].clone()
    for i in range(1, f):
        out |= blocks[..., i, :] << (bits * i)
    return out.reshape(*lead, r // 16, c // (4 * f), 64)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes (..., R, C), uint8."""
    *lead, a, j, _ = packed.shape
    f = 8 // bits
    rows = packed.reshape(*lead, a, j, 16, 1, 4)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device).reshape(f, 1)
    codes = (rows >> shifts) & ((1 << bits) - 1)  # a j r f i
    return codes.movedim(-4, -3).reshape(*lead, a * 16, j * f * 4)


def quantize(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (..., M, N) uint8, scale and minimum (..., M / group, N) fp16 of fp32 x (..., M, N), groups along M.

    scale = (max - min) / (2^bits - 1), 1 where that rounds to nothing; codes are made with the rounded numbers, so |x - x'| is at most
    scale / 2 plus the rounding of the two. A NaN or an infinity makes its group NaN.
    """
    *lead, m, n = x.shape
    grouped = x.reshape(*lead, m // group, group, n)
    low, high = grouped.amin(-2), grouped.amax(-2)
    scale = ((high - low) / (2**bits - 1)).half()
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    minimum = low.half()
    s, z = scale.float().unsqueeze(-2), minimum.float().unsqueeze(-2)
    codes = torch.round((grouped - z) / s).nan_to_num(0.0, 0.0, 0.0).clamp(0, 2**bits - 1)
    return codes.to(torch.uint8).reshape(x.shape), scale, minimum


def dequantize(codes: Tensor, scale: Tensor, minimum: Tensor, group: int) -> Tensor:
    """fp32 (..., M, N)."""
    *lead, m, n = codes.shape
    grouped = codes.reshape(*lead, m // group, group, n).float()
    return torch.addcmul(minimum.float().unsqueeze(-2), grouped, scale.float().unsqueeze(-2)).reshape(codes.shape)
