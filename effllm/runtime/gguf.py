"""GGUF files: metadata, dequantized tensors, and the exact import of Q4_0, Q4_1 and Q8_0 as bipolar weights.

The gguf package is optional and imported where it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effllm.errors import EffllmError


@dataclass
class GGUF:
    """An open GGUF file: `fields` is its metadata, `records` its tensors as memory-mapped quantized blocks."""

    path: Path
    fields: dict[str, Any]
    records: list[Any]

    def dense(self, record: Any) -> Tensor:
        """The fp32 value of a tensor, (out_features, in_features)."""
        from gguf.quants import dequantize

        return torch.from_numpy(dequantize(record.data, record.tensor_type).copy()).float()


def open_gguf(path: str | Path) -> GGUF:
    """Read the header of a GGUF file; EffllmError (E-GGF-*) when that is not possible."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise EffllmError("E-GGF-PACKAGE", "the gguf package is not installed", "python -m pip install 'gguf>=0.19'") from error
    try:
        reader = GGUFReader(str(path))
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise EffllmError("E-GGF-FILE", f"{path} cannot be read as GGUF: {error}", "give a complete GGUF file, version 2 or 3") from error
    return GGUF(Path(path), fields, list(reader.tensors))


def dense_tensors(file: GGUF) -> Iterator[tuple[str, Tensor]]:
    """Every tensor dequantized to fp32, one at a time."""
    for record in file.records:
        yield record.name, file.dense(record)
