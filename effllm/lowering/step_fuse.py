"""Instructions of step programs that become part of others: every hand-over between threads that is spared is worth a microsecond or two.

A residual sum goes into the norm behind it; norm, gated unit and the quantization of activations into the product behind them, where each
thread does them for itself; a rotation that is only written to a cache writes there.
"""

from __future__ import annotations

from effllm.lowering.step_parts import Buffer, Instruction, Value

# operands of a packed product: to, sum, x, scales of x, bias, then three for what comes before it
_X, _SCALES, _SECOND, _THIRD, _FOURTH = 2, 3, 5, 6, 7
PROLOGUE = 9  # where its six arguments begin: kind (0 none, 1 norm, 2 gated unit), four of that instruction, whether to quantize


def fused(instructions: list[Instruction], kept: set[Buffer]) -> list[Instruction]:
    """The instructions with what can be joined joined; `kept` are buffers whose values are wanted outside."""
    alive = list(instructions)
    for join in (_sums, _quantizers, _norms, _gates, _writes):
        readers: dict[Buffer, list[Instruction]] = {}
        for i in alive:
            for v in i.operands[i.outputs :]:
                if v is not None and (not readers.get(v.buffer) or readers[v.buffer][-1] is not i):
                    readers.setdefault(v.buffer, []).append(i)
        dead = {id(i) for i in join(alive, readers, kept)}
        alive = [i for i in alive if id(i) not in dead]
    return alive


def _whole(value: Value | None, of: Value) -> bool:
    """Whether a view is all of another's buffer, element by element."""
    return value is not None and value.buffer is of.buffer and value.meta.is_contiguous() and value.meta.numel() == of.buffer.numel


def _sums(alive: list[Instruction], readers: dict[Buffer, list[Instruction]], kept: set[Buffer]) -> list[Instruction]:
    """A sum into the norm that reads it first."""
    dead = []
    for i in alive:
        out, *rest = i.operands
        if i.code != "binary" or i.args[0] != 0 or out is None or not out.meta.dtype.is_floating_point:
            continue
        first = readers.get(out.buffer, [None])[0]
        if first is None or first.code != "norm" or first.operands[1] is not None or not _whole(first.operands[2], out):
            continue
        if all(v is not None and v.meta.is_contiguous() and v.meta.shape == out.meta.shape for v in rest):
            first.operands[1], first.operands[2], first.operands[5] = out, rest[0], rest[1]
            dead.append(i)
    return dead


def _only(i: Instruction, readers: dict[Buffer, list[Instruction]], kept: set[Buffer], codes: tuple[str, ...]) -> Instruction | None:
    """The one instruction that reads what another writes, if it is of these."""
    out = i.operands[0]
    if out is None or out.buffer in kept or out.buffer.tensor >= 0:
        return None
    found = readers.get(out.buffer, [])
    return found[0] if len(found) == 1 and found[0].code in codes else None


def _quantizers(alive: list[Instruction], readers: dict[Buffer, list[Instruction]], kept: set[Buffer]) -> list[Instruction]:
    """The quantization of activations into the one product that reads it."""
    dead = []
    for i in alive:
        user = _only(i, readers, kept, ("packed_a8",)) if i.code == "quantize" else None
        if user is not None and i.operands[1] is not None and readers.get(i.operands[1].buffer) == [user]:
            user.operands[_X], user.operands[_SCALES] = i.operands[2], None
            user.args[PROLOGUE + 5] = 1
            dead.append(i)
    return dead


def _norms(alive: list[Instruction], readers: dict[Buffer, list[Instruction]], kept: set[Buffer]) -> list[Instruction]:
    """A norm into the one product that reads it."""
    return [i for i in alive if i.code == "norm" and _into(i, readers, kept, 1)]


def _gates(alive: list[Instruction], readers: dict[Buffer, list[Instruction]], kept: set[Buffer]) -> list[Instruction]:
    """A gated unit into the one product that reads it."""
    return [i for i in alive if i.code == "glu" and _into(i, readers, kept, 2)]


def _into(i: Instruction, readers: dict[Buffer, list[Instruction]], kept: set[Buffer], kind: int) -> bool:
    user = _only(i, readers, kept, ("packed", "packed_a8"))
    out = i.operands[0]
    if user is None or out is None or user.args[PROLOGUE] or not _whole(user.operands[_X], out):
        return False
    if user.code == "packed_a8" and not user.args[PROLOGUE + 5]:
        return False
    if kind == 1:
        _, total, x, weight, bias, other = i.operands
        user.operands[1], user.operands[_X] = total, x
        user.operands[_SECOND], user.operands[_THIRD], user.operands[_FOURTH] = weight, bias, other
    else:
        _, gate, up = i.operands
        if gate is None or up is None:
            return False
        user.operands[_X], user.operands[_SECOND] = gate, up
    user.args[PROLOGUE : PROLOGUE + 1 + len(i.args)] = [kind, *i.args]
    return True


def _writes(alive: list[Instruction], readers: dict[Buffer, list[Instruction]], kept: set[Buffer]) -> list[Instruction]:
    """The write of a rotation to a cache into the rotation."""
    dead = []
    for i in alive:
        user = _only(i, readers, kept, ("write",)) if i.code == "rotate" else None
        if user is None or i.operands[0] is None or not _whole(user.operands[2], i.operands[0]) or user.operands[2].meta.shape != i.operands[0].meta.shape:  # type: ignore[union-attr]
            continue
        # where the write was: what it follows and what follows it stay in their order
        user.code, user.args = "rotate", [i.args[0], user.args[0]]
        user.operands = [user.operands[0], *i.operands[1:4], user.operands[1]]
        dead.append(i)
    return dead
