"""Step programs: instructions over strided views of buffers, in the integers that kernels/cpu/step.cpp reads.

    builder = Builder()
    x = builder.external(meta)                       # a tensor of the call; `meta` has its shape, strides and dtype
    y = builder.produce(shape, dtype)                # a buffer
    builder.emit("binary", [y, x, x], (ADD,))        # the first `outputs` operands are written
    code = builder.finish([y])                       # y becomes a tensor that the caller gives, too

Instructions run in levels: one starts when every earlier one that it depends on is done, and those of a level run side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from effllm.lowering import step_fuse
from effllm.lowering.step_parts import ANY, DIMS, FIRST, KINDS, NOTHING, NUMBERS, RANGE, WORKSPACE, Buffer, Instruction, Step, Value
from effllm.lowering.step_parts import CODE as CONSTANTS

CODES = (
    "copy", "binary", "unary", "norm", "glu", "rotate", "write", "packed", "packed_a8", "quantize", "attend", "dense", "rows", "packed_rows", "largest", "call",
)  # fmt: skip
BINARY = ("add", "sub", "mul", "div", "above", "le", "lt", "ge", "gt", "eq", "ne", "and", "or")  # from "le" on the result is bool
UNARY = ("silu", "gelu", "gelu_tanh", "relu", "sigmoid", "tanh", "neg", "cos", "sin")
_ALIGN = 64


@dataclass(frozen=True)
class Code:
    """A finished program. Tensors of a call come in the order of `Builder.external`, then those of `finish`."""

    words: Tensor
    numbers: Tensor
    elements: list[int]  # of each external tensor
    workspace: int  # bytes
    outputs: list[tuple[tuple[int, ...], torch.dtype]]
    written: list[int]  # positions of external tensors that change
    steps: list[Step]


@dataclass
class Builder:
    """Collects instructions. Nothing here looks at a graph."""

    instructions: list[Instruction] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)  # of the call
    numbers: list[float] = field(default_factory=list)
    integers: list[int] = field(default_factory=list)
    label: str = ""  # of the instructions to come

    def external(self, meta: Tensor, numel: int | None = None) -> Value:
        """A tensor of the call."""
        buffer = Buffer(meta.numel() if numel is None else numel, meta.dtype, len(self.buffers), FIRST + len(self.buffers))
        self.buffers.append(buffer)
        return Value(buffer, torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype, device="meta"))

    def produce(self, shape: Sequence[int], dtype: torch.dtype) -> Value:
        """A contiguous buffer."""
        meta = torch.empty(tuple(shape), dtype=dtype, device="meta")
        return Value(Buffer(meta.numel(), dtype), meta)

    def constant(self, values: Sequence[float], dtype: torch.dtype, shape: Sequence[int]) -> Value:
        """Numbers that the program carries: int64 or fp32; one value where the shape has none."""
        store: list = self.integers if dtype == torch.int64 else self.numbers  # type: ignore[type-arg]
        offset = len(store)
        store.extend(values)
        slot = CONSTANTS if dtype == torch.int64 else NUMBERS
        return Value(Buffer(len(values), dtype, slot=slot, offset=offset), torch.empty(tuple(shape), dtype=dtype, device="meta"))

    def range(self, start: int, length: int) -> Value:
        """int64 numbers from `start` on, (length,), which are stored nowhere: "binary" and "copy" read such operands, and their views."""
        return Value(Buffer(length, torch.int64, slot=RANGE, offset=start), torch.empty(length, dtype=torch.int64, device="meta"))

    def number(self, value: float) -> int:
        """The index of a number, for an instruction's arguments."""
        if value not in self.numbers:
            self.numbers.append(float(value))
        return self.numbers.index(value)

    def emit(self, code: str, operands: Sequence[Value | None], args: Iterable[int] = (), outputs: int = 1) -> None:
        """Append an instruction."""
        self.instructions.append(Instruction(code, list(operands), [int(a) for a in args], outputs, self.label))

    def finish(self, outputs: Sequence[Value]) -> Code:
        """Order, place and encode; every output is a whole buffer that some instruction wrote."""
        order = _levels(step_fuse.fused(self.instructions, {v.buffer for v in outputs}))
        given: list[Buffer] = []
        for value in outputs:
            value.buffer.tensor, value.buffer.slot = len(self.buffers) + len(given), FIRST + len(self.buffers) + len(given)
            given.append(value.buffer)
        size = _place(order)
        head = [len(order), len(self.buffers) + len(given)]
        body = sum(4 + len(i.args) + (3 + 2 * DIMS) * len(i.operands) for i in order)
        first = len(head) + body  # where the integer constants begin
        words = head
        for i in order:
            words += [CODES.index(i.code), i.level, len(i.args), len(i.operands), *i.args]
            for operand in i.operands:
                words += _view(operand, first)
        numbers = torch.tensor(self.numbers or [0.0], dtype=torch.float32)
        written = sorted({v.buffer.tensor for i in order for v in i.operands[: i.outputs] if v is not None and 0 <= v.buffer.tensor < len(self.buffers)})
        return Code(
            torch.tensor([*words, *self.integers], dtype=torch.int64), numbers, [b.numel for b in self.buffers], size,
            [(tuple(v.meta.shape), v.meta.dtype) for v in outputs], written, [Step(_title(i), i.level, i.label, _read(i)) for i in order],
        )  # fmt: skip


def _title(i: Instruction) -> str:
    """Calls by what they call (passes/step_calls.py)."""
    return i.code if i.code != "call" else "".join(map(chr, i.args[2 : 2 + i.args[1]]))


def _read(i: Instruction) -> int:
    if i.code in ("rows", "packed_rows", "largest", "call"):  # a few rows of the table
        return sum(v.meta.numel() * v.meta.element_size() for v in i.operands[: i.outputs] if v is not None)
    return sum(v.meta.numel() * v.meta.element_size() for v in i.operands[i.outputs :] if v is not None and v.buffer.tensor >= 0)


def _view(value: Value | None, constants: int) -> list[int]:
    if value is None:
        return [NOTHING, 0, 0, *[1] * DIMS, *[0] * DIMS]
    meta, buffer = value.meta, value.buffer
    pad = DIMS - meta.dim()
    stride = [0 if n == 1 else s for n, s in zip(meta.shape, meta.stride(), strict=True)]
    if meta.dim() and meta.shape[-1] == 1:
        stride[-1] = 1
    offset = buffer.offset + meta.storage_offset() + (constants if buffer.slot == CONSTANTS else 0)
    return [buffer.slot, offset, KINDS.get(meta.dtype, ANY), *[1] * pad, *meta.shape, *[0] * pad, *stride]


def _levels(instructions: list[Instruction]) -> list[Instruction]:
    """Levels by what reads what was written, what writes what was read or written; sorted by them, ties in the given order."""
    wrote: dict[Buffer, int] = {}
    read: dict[Buffer, int] = {}
    for i in instructions:
        outs, ins = ([v.buffer for v in part if v is not None] for part in (i.operands[: i.outputs], i.operands[i.outputs :]))
        level = max([0, *(wrote.get(b, -1) + 1 for b in (*ins, *outs)), *(read.get(b, -1) + 1 for b in outs)])
        i.level = level
        for b in ins:
            read[b] = max(level, read.get(b, -1))
        for b in outs:
            wrote[b] = level
    return sorted(instructions, key=lambda i: i.level)


def _place(order: list[Instruction]) -> int:
    """Offsets of buffers in the workspace: a buffer's memory is free again in the level after its last use. Returns the bytes needed."""
    last: dict[Buffer, int] = {}
    for i in order:
        for v in i.operands:
            if v is not None and v.buffer.slot == WORKSPACE:
                last[v.buffer] = i.level
    busy: list[tuple[int, int, int]] = []  # begin, end, last level
    placed: set[Buffer] = set()
    size = 0
    for i in order:
        busy = [b for b in busy if b[2] >= i.level]
        for v in i.operands:
            if v is None or v.buffer.slot != WORKSPACE or v.buffer in placed:
                continue
            need = -(-v.buffer.numel * v.buffer.dtype.itemsize // _ALIGN) * _ALIGN
            begin = 0
            for a, b, _ in sorted(busy):
                if begin + need <= a:
                    break
                begin = max(begin, b)
            busy.append((begin, begin + need, last[v.buffer]))
            v.buffer.offset = begin // v.buffer.dtype.itemsize
            placed.add(v.buffer)
            size = max(size, begin + need)
    return size
