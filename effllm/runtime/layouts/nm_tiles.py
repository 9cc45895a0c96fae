"""The AVX-512 layout of 2:4 weights: tiles of 16 rows, one lane of 32 bits a row (kernels/cpu/nm_tiles.h).

With H groups of four columns in a row, K padded to 32 (H is a multiple of 8), T = ceil(N / 16) tiles, and the two kept columns of a
group as a nibble i | j << 2 with i < j:

    values   bf16   (T, H, 16, 2)         the two kept weights of group h of row r
       or    uint8  (T, H bits / 16, 64)  codes of 8 bits: unit q (two groups), row r, byte i holds code 4 q + i of the row;
                                          of 4 bits: unit 2 q in the low nibbles, unit 2 q + 1 in the high ones
    index    uint8  (T, H / 8, 64)        bf16: lane r of 32 bits holds the nibbles of 8 groups, the first lowest
                                          codes: of lane r the low 16 bits hold the even ones of 8 groups, the high 16 the odd ones
    scale    fp16 or fp32  (T, G, 16), minimum likewise
    left, right   as in nm_rows

Rows past N and columns past K hold zeros with scale 0, or meet activation 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.errors import KernelError
from effllm.runtime.formats import bipolar, nm, parts
from effllm.runtime.formats.base import Packed
from effllm.runtime.layouts import nm_plain
from effllm.runtime.layouts.nm_rows import pair_blocks, wrapper

__all__ = ["codes", "columns", "repack", "values", "wrapper"]

ROWS, BLOCK = 16, 32


def _tiled(t: Tensor, width: int, fill: int = 0) -> Tensor:
    """(N, W) to (T, 16, width), padded with `fill`."""
    n, w = t.shape
    full = t.new_full((-(-n // ROWS) * ROWS, width), fill)
    full[:n, : min(w, width)] = t[:, :width]
    return full.view(-1, ROWS, width)


def repack(packed: Packed) -> dict[str, Tensor]:
    """Canonical tensors to tiles. Raises KernelError (E-KRN-LAYOUT) for another pattern, other values or codes of other widths."""
    core, wrappers = nm_plain.core_of(packed)
    part = parts.part(core, "values")
    coded = part.format == bipolar.name
    stored = part.attrs["bits"] if coded else part.tensors["values"].dtype
    if (core.attrs["n"], core.attrs["m"]) != (2, 4) or stored not in (4, 8, torch.bfloat16):
        raise KernelError("E-KRN-LAYOUT", f"{core.attrs['n']}:{core.attrs['m']} of {stored} in tiles", "tiles hold 2:4 weights in bf16 or codes of 4 or 8 bits")
    out = {key: pair_blocks(t) for key, t in wrappers.items()}
    width = -(-core.shape[1] // BLOCK) * BLOCK
    pair = (nm.columns_of(core) % 4).view(core.shape[0], -1, 2)
    nibble = _tiled(pair[..., 0] | pair[..., 1] << 2, width // 4, 4).view(-1, ROWS, width // 32, 8)
    if not coded:
        out["index"] = (nibble[..., ::2] | nibble[..., 1::2] << 4).to(torch.uint8).transpose(1, 2).reshape(nibble.shape[0], -1, 64)
        out["values"] = _tiled(part.tensors["values"], width // 2).view(-1, ROWS, width // 4, 2).transpose(1, 2).contiguous()
        return out
    # the four bytes of a lane: even groups 0 2, 4 6, odd groups 1 3, 5 7
    lane = torch.stack([nibble[..., a] | nibble[..., a + 2] << 4 for a in (0, 4, 1, 5)], -1)
    out["index"] = lane.to(torch.uint8).transpose(1, 2).reshape(nibble.shape[0], -1, 64)
    unit = _tiled(bipolar.unpack_codes(part.tensors["planes"]), width // 2).view(-1, ROWS, width // 8, 4)
    if stored == 4:
        unit = unit[:, :, ::2] | unit[:, :, 1::2] << 4
    out["values"] = unit.transpose(1, 2).reshape(unit.shape[0], -1, 64)
    for key in ("scale", "minimum"):
        if key in part.tensors:
            out[key] = _tiled(part.tensors[key], part.tensors[key].shape[1]).transpose(1, 2).contiguous()
    return out


def columns(index: Tensor, n: int, k: int, keep: int, of: int, coded: bool = False) -> Tensor:
    """Columns (N, Kc) of the kept weights."""
    lane = index.view(index.shape[0], -1, ROWS, 4).transpose(1, 2)  # (T, row, H / 8, byte); bytes as long as that will do
    low, high = lane & 15, lane >> 4
    order = [low[..., 0], low[..., 2], high[..., 0], high[..., 2], low[..., 1], low[..., 3], high[..., 1], high[..., 3]]
    nibble = torch.stack(order if coded else [t[..., i] for i in range(4) for t in (low, high)], -1).reshape(-1, index.shape[1] * 8)[:n, : -(-k // 4)]
    place = torch.stack([nibble & 3, nibble >> 2], -1)
    return (place + torch.arange(nibble.shape[1], device=index.device).view(1, -1, 1) * 4).reshape(n, -1)


def values(stored: Tensor, n: int, k: int, keep: int, of: int) -> Tensor:
    """Kept floating-point weights (N, Kc), differentiable."""
    return stored.transpose(1, 2).reshape(stored.shape[0] * ROWS, -1)[:n, : nm.kept(k, keep, of)]


def codes(
    stored: Tensor, scale: Tensor, minimum: Tensor | None, *, n: int, k: int, keep: int, of: int, bits: int, group: int
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Unsigned codes (N, G group) with scale and minimum (N, G)."""
    u = stored.view(stored.shape[0], -1, ROWS, 4)
    if bits == 4:
        u = torch.stack([u & 15, u >> 4], 2).flatten(1, 2)
    u = u.transpose(1, 2).reshape(stored.shape[0] * ROWS, -1)[:n]
    width = bipolar.padded(nm.kept(k, keep, of), group)
    u = torch.nn.functional.pad(u, (0, max(0, width - u.shape[1])))[:, :width]
    low = None if minimum is None else minimum.transpose(1, 2).reshape(-1, minimum.shape[1])[:n]
    return u, scale.transpose(1, 2).reshape(-1, scale.shape[1])[:n], low
