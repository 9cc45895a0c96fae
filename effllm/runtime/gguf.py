"""GGUF files: metadata, dequantized tensors, and the exact import of Q4_0, Q4_1 and Q8_0 as bipolar weights.

A GGUF block holds 32 weights of one row. Code for code, with group 32:

    Q4_0   w = d (q - 8)      q in 0..15       integer grid, scale = d / 2
    Q4_1   w = d q + m        q in 0..15       affine grid,  scale = d / 2, minimum = m
    Q8_0   w = d q            q in -128..127   integer grid, scale = d / 2, u = q + 128

Block bytes: d (fp16), m (fp16, Q4_1 only), then 16 bytes whose low nibbles are weights 0..15 and high nibbles weights 16..31
(Q4), or 32 int8 (Q8_0). d / 2 is exact in fp16 unless d is tiny; then the tensor's scales are stored in fp32.

The gguf package is optional and imported where it is used.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effllm.errors import EffllmError
from effllm.runtime.formats import bipolar
from effllm.runtime.formats.base import Packed

GROUP = 32
BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}


@dataclass
class GGUF:
    """An open GGUF file: `fields` is its metadata, `records` its tensors as memory-mapped quantized blocks."""

    path: Path
    fields: dict[str, Any]
    records: list[Any]


def open_gguf(path: str | Path) -> GGUF:
    """Read the header of a GGUF file; EffllmError (E-GGF-*) when that is not possible."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise EffllmError("E-GGF-PACKAGE", "the gguf package is not installed", "python -m pip install 'gguf>=0.19'") from error
    try:
        reader = GGUFReader(str(path))
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (OSError, ValueError, IndexError, KeyError, struct.error) as error:
        raise EffllmError("E-GGF-FILE", f"{path} cannot be read as GGUF: {error}", "give a complete GGUF file, version 2 or 3") from error
    if reader.byte_order == "S":
        raise EffllmError("E-GGF-FILE", f"{path} has the other byte order", "convert it for this machine")
    return GGUF(Path(path), fields, list(reader.tensors))


def dense(record: Any) -> Tensor:
    """The fp32 value of one tensor, (out_features, in_features)."""
    from gguf.quants import dequantize

    return torch.from_numpy(dequantize(record.data, record.tensor_type).copy()).float()


def pack_blocks(kind: str, blocks: Tensor, k: int) -> Packed:
    """Rows of GGUF blocks, uint8 (N, K / 32 * block bytes), of kind Q4_0, Q4_1 or Q8_0, as an equal bipolar weight (N, K)."""
    n, size = blocks.shape[0], BLOCK_BYTES[kind]
    if k % GROUP or blocks.shape[1] != k // GROUP * size:
        raise EffllmError("E-GGF-SHAPE", f"{kind} rows of {blocks.shape[1]} bytes cannot hold {k} weights", "the file is damaged; get it again")
    blocks = blocks.view(n, k // GROUP, size)

    def half(at: int) -> Tensor:
        return blocks[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1)

    d = half(0)
    minimum = half(2) if kind == "Q4_1" else None
    data = blocks[..., 4 if kind == "Q4_1" else 2 :]
    codes = data ^ 128 if kind == "Q8_0" else torch.cat([data & 15, data >> 4], dim=-1)
    scale = d / 2
    if not torch.equal(scale * 2, d):  # d is so small that halving it drops a bit
        scale, minimum = d.float() / 2, None if minimum is None else minimum.float()
    grid = "affine" if minimum is not None else "integer"
    return bipolar.make(codes.reshape(n, k), scale, minimum, k=k, bits=BITS[kind], group=GROUP, grid=grid)


def read(record: Any) -> Packed | Tensor:
    """One tensor: packed where its codes carry over exactly, else its fp32 value."""
    kind = record.tensor_type.name
    if kind not in BITS or len(record.shape) != 2:
        return dense(record)
    return pack_blocks(kind, torch.from_numpy(record.data.copy()), int(record.shape[0]))


def import_gguf(path: str | Path) -> Iterator[tuple[str, Packed | Tensor]]:
    """Every tensor of a GGUF file under its GGUF name: Q4_0, Q4_1 and Q8_0 as `Packed`, equal weight by weight; others as fp32.

    Holds one tensor at a time. Raises EffllmError (E-GGF-PACKAGE, E-GGF-FILE, E-GGF-SHAPE).
    """
    for record in open_gguf(path).records:
        yield record.name, read(record)
