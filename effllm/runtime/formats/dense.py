"""Plain floating-point values: the part of a composed format that is not quantized.

    values   fp32, bf16 or fp16  (N, K)
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor

from effllm.errors import CheckpointError
from effllm.runtime.formats.base import Packed

name = "dense"
version = 1
tensor_names: tuple[str, ...] = ("values",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(values: Tensor) -> Packed:
    """Store a matrix (N, K) as it is."""
    packed = Packed(name, version, (values.shape[0], values.shape[1]), {"values": values.contiguous()})
    validate(packed)
    return packed


def unpack(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The (N, K) values."""
    return packed.tensors["values"].to(dtype)


def nbytes(*, value_bytes: int = 2, **_: Any) -> sympy.Expr:
    """Stored bytes over the symbols N and K."""
    n, k = sympy.symbols("N K", positive=True, integer=True)
    return n * k * value_bytes


def validate(packed: Packed) -> None:
    """Raise CheckpointError where tensors and attributes do not fit together."""
    values = packed.tensors.get("values")
    if values is None or set(packed.tensors) != {"values"} or tuple(values.shape) != packed.shape or values.dtype not in DTYPES:
        found = {key: (tuple(t.shape), str(t.dtype)) for key, t in packed.tensors.items()}
        raise CheckpointError("E-CKP-SHAPE", f"dense weight {packed.shape}: its tensors are {found}", "the file is damaged or not from effllm; write it again")
