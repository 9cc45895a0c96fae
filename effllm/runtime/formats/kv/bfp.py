"""Block floating point for keys and values: n consecutive channels of a token share an exponent (arXiv:2403.20137).

A block with largest magnitude in [2^e, 2^(e+1)) has step 2^(e - m + 2) and codes round(x / step) within +-(2^(m-1) - 1), m the mantissa's
bits with sign. Two rules for e: "clip" takes e = floor(log2 max|x|), and a maximum inside the last step of its binade is cut by up to one
step; "raise" adds one to e where rounding the maximum would overflow.

    codes      int8 (..., T, D), or for m <= 4 bytes (..., T, D / 2): the low half holds channel i, the high half channel i + D / 2, two's complement
    exponent   int8 (..., T, D / n)

Bits per element: m + 8 / n (8 + 8 / n for 5 <= m <= 8). A block with a NaN or an infinity is NaN; below 2^-110 a block counts as zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from effllm.errors import CacheError

BLOCKS = (16, 32, 64, 128)
RULES = ("clip", "raise")
NAN = 127  # exponent of a block that holds something not finite
LEAST = -110


class Bfp(NamedTuple):
    """Codes and exponents."""

    codes: Tensor
    exponent: Tensor


def check(dim: int, mantissa: int, block: int, rule: str = "clip") -> None:
    """Raise CacheError (E-KVC-BITS, E-KVC-GROUP, E-KVC-RULE) for settings that the format does not have."""
    if not isinstance(mantissa, int) or not 2 <= mantissa <= 8:
        raise CacheError("E-KVC-BITS", f"bits={mantissa!r}", "a mantissa has 2 to 8 bits, sign included")
    if not isinstance(block, int) or block < 1:
        raise CacheError("E-KVC-GROUP", f"blocks of {block!r} channels", f"use one of {BLOCKS} that divides the head")
    if dim % block or dim % 2:
        raise CacheError("E-KVC-GROUP", f"blocks of {block!r} do not divide a head of {dim} channels", f"use one of {BLOCKS} that divides it")
    if rule not in RULES:
        raise CacheError("E-KVC-RULE", f"rule={rule!r}", f"valid: {', '.join(RULES)}")


def encode(x: Tensor, mantissa: int, block: int, rule: str = "clip") -> Bfp:
    """Quantize x (..., T, D). Raises CacheError where the block does not divide D."""
    check(x.shape[-1], mantissa, block, rule)
    blocks = x.unflatten(-1, (-1, block)).double() if x.dtype == torch.float64 else x.unflatten(-1, (-1, block)).float()
    most = blocks.abs().amax(-1, keepdim=True)
    bad = ~most.isfinite()
    e = torch.frexp(most.masked_fill(bad, 0)).exponent - 1
    e = torch.where(most == 0, LEAST, e).clamp(LEAST, 125)
    top = (1 << (mantissa - 1)) - 1
    if rule == "raise":
        e = e + (torch.ldexp(most, mantissa - 2 - e).round() > top).to(e.dtype)
    codes = torch.ldexp(blocks, mantissa - 2 - e).round().clamp(-top, top).masked_fill(bad, 0).to(torch.int8).flatten(-2)
    exponent = torch.where(bad, NAN, e).to(torch.int8).squeeze(-1)
    return Bfp(pack4(codes) if mantissa <= 4 else codes, exponent)


def decode(stored: Bfp, mantissa: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The exact values (..., T, D) of what is stored."""
    codes = unpack4(stored.codes) if mantissa <= 4 else stored.codes
    e = stored.exponent.int()[..., None]
    exact = torch.ldexp(codes.unflatten(-1, (stored.exponent.shape[-1], -1)).to(torch.float64 if dtype == torch.float64 else torch.float32), e - mantissa + 2)
    return exact.masked_fill(e == NAN, torch.nan).flatten(-2).to(dtype)


def pack4(codes: Tensor) -> Tensor:
    """int8 codes within -8..7 (..., D) as bytes (..., D / 2): channel i low, channel i + D / 2 high."""
    low, high = codes.view(torch.uint8).chunk(2, -1)
    return (low & 15) | (high << 4)


def unpack4(packed: Tensor) -> Tensor:
    """Undoes `pack4`."""
    both = torch.cat((packed & 15, packed >> 4), -1).to(torch.int8)
    return torch.where(both > 7, both - 16, both)


def token_bytes(dim: int, mantissa: int, block: int) -> int:
    """Bytes of one token of one head."""
    return (dim // 2 if mantissa <= 4 else dim) + dim // block
