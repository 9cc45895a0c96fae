"""What step programs are made of: buffers, views of them, instructions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int64: 3, torch.bool: 4, torch.int8: 5}
ANY = 5  # kind of operands that are read as bytes, such as codes
DIMS = 5
CODE, NUMBERS, WORKSPACE, FIRST = 0, 1, 2, 3  # slots: the program's integers, its numbers, the workspace, the tensors of the call
NOTHING, RANGE = -1, -2  # slots of operands that are not there, or are integers in order that nobody stored


@dataclass(eq=False)
class Buffer:
    """Memory: a tensor of the call (`tensor` its position), a part of the workspace, or constants."""

    numel: int
    dtype: torch.dtype
    tensor: int = -1  # position among the tensors of the call
    slot: int = WORKSPACE
    offset: int = 0  # elements


@dataclass(frozen=True)
class Value:
    """A strided view of a buffer, as a meta tensor whose storage offset counts from the buffer's first element."""

    buffer: Buffer
    meta: Tensor

    def like(self, meta: Tensor) -> Value:
        """Another view of the same buffer."""
        return Value(self.buffer, meta)


@dataclass
class Instruction:
    """One operation; the first `outputs` operands are written, `also` are read through one of them (in-place changes)."""

    code: str
    operands: list[Value | None]
    args: list[int]
    outputs: int = 1
    label: str = ""  # where it comes from, for profiles
    level: int = 0


class Step(NamedTuple):
    """What a profile says of an instruction: its operation, level and origin, and the bytes of the call's tensors that it reads."""

    code: str
    level: int
    label: str
    read: int
