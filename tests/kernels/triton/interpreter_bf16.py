"""bf16 in Triton's interpreter as a GPU computes it: it rounds where the interpreter cuts off, and multiplies numbers, not bit patterns."""

from __future__ import annotations

from typing import Any


def patch() -> None:
    """Call it once in a worker process, behind the choice of the interpreter."""
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    convert, builder = interpreter._convert_float, interpreter.InterpreterBuilder
    dot, binary, ternary = builder.create_dot, builder.binary_op, builder.ternary_op

    def rounded(x: Any, given: Any, wanted: Any, mode: Any) -> Any:
        if (given, wanted) != (tl.float32, tl.bfloat16):
            return convert(x, given, wanted, mode)
        flat = torch.from_numpy(np.frombuffer(x.tobytes(), dtype=np.float32).copy())
        return flat.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16).reshape(x.shape)

    def wide(h: Any) -> Any:
        return interpreter.TensorHandle((h.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def narrow(h: Any) -> Any:
        return interpreter.TensorHandle(rounded(h.data.astype(np.float32), tl.float32, tl.bfloat16, None), tl.bfloat16)

    def is_bf16(h: Any) -> bool:
        return bool(h.dtype.scalar == tl.bfloat16)

    def dots(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return dot(self, *((wide(a), wide(b)) if is_bf16(a) else (a, b)), d, *rest)

    def pairs(self: Any, a: Any, b: Any, op: Any) -> Any:
        return narrow(binary(self, wide(a), wide(b), op)) if is_bf16(a) else binary(self, a, b, op)

    def triples(self: Any, a: Any, b: Any, c: Any, op: Any) -> Any:
        return narrow(ternary(self, wide(a), wide(b), wide(c), op)) if is_bf16(a) and is_bf16(c) else ternary(self, a, b, c, op)

    interpreter._convert_float = rounded
    builder.create_dot, builder.binary_op, builder.ternary_op = dots, pairs, triples
