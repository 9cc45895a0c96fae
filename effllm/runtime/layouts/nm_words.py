"""The GPU layout of 2:4 weights: outputs contiguous, so that neighbouring lanes read neighbouring numbers (kernels/triton/nm.py).

With H groups of four columns, K padded to 32, and Np = N rounded up to 16:

    values   fp16, bf16 or fp32  (2, H, Np)   the first and the second kept weight of each group
       or    uint8  (2, H, Np)                codes of 8 bits
       or    uint8  (1, H, Np)                codes of 4 bits, the first in the low nibble
    index    int32  (H / 8, Np)               nibbles i | j << 2 of eight groups, the first lowest
    scale    fp16 or fp32  (G, Np) along the compressed axis, minimum likewise
    left, right   (N, d) and (K, d), ARMOR only: rows of the blocks

Padded outputs hold zeros with scale 0; padded columns hold zeros, or codes that meet activation 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.errors import KernelError
from effllm.runtime.formats import armor, bipolar, nm, parts
from effllm.runtime.formats.base import Packed
from effllm.runtime.layouts import nm_plain
from effllm.runtime.layouts.words import padded_outputs

BLOCK = 32


def _turned(t: Tensor, height: int, fill: int = 0) -> Tensor:
    """(N, W) to (height, Np), padded with `fill`."""
    n, w = t.shape
    out = t.new_full((height, padded_outputs(n)), fill)
    out[: min(w, height), :n] = t[:, :height].t()
    return out


def repack(packed: Packed) -> dict[str, Tensor]:
    """Canonical tensors to words. Raises KernelError (E-KRN-LAYOUT) for another pattern or codes of other widths."""
    core, wrappers = nm_plain.core_of(packed)
    part = parts.part(core, "values")
    bits = part.attrs["bits"] if part.format == bipolar.name else 0
    if (core.attrs["n"], core.attrs["m"]) != (2, 4) or bits not in (0, 4, 8):
        cause = f"{core.attrs['n']}:{core.attrs['m']} with {bits} bits in words"
        raise KernelError("E-KRN-LAYOUT", cause, "words hold 2:4 weights, floating point or coded in 4 or 8 bits")
    groups = -(-core.shape[1] // BLOCK) * BLOCK // 4
    pair = (nm.columns_of(core) % 4).view(core.shape[0], -1, 2)
    nibble = _turned(pair[..., 0] | pair[..., 1] << 2, groups, 4).view(groups // 8, 8, -1)
    word = (nibble << torch.arange(8, device=nibble.device).view(1, 8, 1) * 4).sum(1)
    out = dict(wrappers) | {"index": torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32)}
    kept = bipolar.unpack_codes(part.tensors["planes"]) if bits else part.tensors["values"]
    planes = _turned(kept, 2 * groups).view(groups, 2, -1)
    out["values"] = (planes[:, 0] | planes[:, 1] << 4).unsqueeze(0) if bits == 4 else planes.transpose(0, 1).contiguous()
    for key in ("scale", "minimum"):
        if key in part.tensors:
            out[key] = _turned(part.tensors[key], part.tensors[key].shape[1])
    return out


def columns(index: Tensor, n: int, k: int, keep: int, of: int, coded: bool = False) -> Tensor:
    """Columns (N, Kc) of the kept weights."""
    nibble = torch.stack([index >> 4 * i & 15 for i in range(8)], 1).reshape(-1, index.shape[1])[: -(-k // 4), :n].t().to(torch.int64)
    place = torch.stack([nibble & 3, nibble >> 2], -1)
    return (place + torch.arange(nibble.shape[1], device=index.device).view(1, -1, 1) * 4).reshape(n, -1)


def values(stored: Tensor, n: int, k: int, keep: int, of: int) -> Tensor:
    """Kept floating-point weights (N, Kc), differentiable."""
    return stored.permute(2, 1, 0)[:n].reshape(n, -1)[:, : nm.kept(k, keep, of)]


def codes(
    stored: Tensor, scale: Tensor, minimum: Tensor | None, *, n: int, k: int, keep: int, of: int, bits: int, group: int
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Unsigned codes (N, G group) with scale and minimum (N, G)."""
    two = torch.cat([stored & 15, stored >> 4]) if bits == 4 else stored
    u = values(two, n, k, keep, of)
    u = torch.nn.functional.pad(u, (0, bipolar.padded(u.shape[1], group) - u.shape[1]))
    return u, scale[:, :n].t(), None if minimum is None else minimum[:, :n].t()


def wrapper(stored: Tensor) -> Tensor:
    """Blocks (B, d, d) of a wrapper."""
    return armor.blocks(stored)
