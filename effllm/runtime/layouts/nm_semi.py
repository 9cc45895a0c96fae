"""The layout of 2:4 weights that CUTLASS multiplies on sparse tensor cores, as torch makes it (runtime/semi_structured.py).

    values   fp16 or bf16  (N, K / 2)   kept weights in order of their column
    index    int16  (N, K / 16)         metadata words of four groups, in the order that CUTLASS reads
    left, right   (N, d) and (K, d), ARMOR only: rows of the blocks

N is a multiple of 32 and K of 64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.errors import KernelError
from effllm.runtime import semi_structured
from effllm.runtime.formats.base import Packed
from effllm.runtime.layouts import nm_plain
from effllm.runtime.layouts.nm_plain import wrapper

__all__ = ["codes", "columns", "repack", "values", "wrapper"]

ROWS, COLUMNS = 32, 64


def repack(packed: Packed) -> dict[str, Tensor]:
    """Canonical tensors to values and metadata. Raises WeightError (E-WGT-SEMI) for what semi-structured tensors do not hold."""
    core, wrappers = nm_plain.core_of(packed)
    kept, meta = semi_structured.to_cutlass(core)
    return dict(wrappers) | {"values": kept, "index": meta}


def columns(index: Tensor, n: int, k: int, keep: int, of: int, coded: bool = False) -> Tensor:
    """Columns (N, Kc) of the kept weights."""
    return semi_structured.unpack_meta(index, torch.float16 if index.dtype == torch.int16 else torch.int8)


def values(stored: Tensor, n: int, k: int, keep: int, of: int) -> Tensor:
    """Kept floating-point weights (N, Kc), differentiable."""
    return stored


def codes(stored: Tensor, scale: Tensor, minimum: Tensor | None, **sizes: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """There are none: values are floating point."""
    raise KernelError("E-KRN-LAYOUT", "semi-structured tensors with scales", "repack coded weights to words")
