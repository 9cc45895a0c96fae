"""Operators that work element by element, and those that make tensors of one value."""

from __future__ import annotations

import torch
from torch import fx

from effllm.coupling.axes import fresh, leaves, unify
from effllm.coupling.rules.base import Axes, Call, broadcast, pinned_like, rule

# element-wise without torch's tag, because they decompose into tagged ones
UNTAGGED = frozenset({"aten.__and__", "aten.__or__", "aten.__xor__", "aten.floor_divide", "aten.where", "aten.masked_fill", "aten.masked_fill_", "aten.copy_"})


def is_pointwise(target: torch._ops.OpOverload, op: str) -> bool:
    """Whether torch says that an operator works element by element."""
    return torch.Tag.pointwise in target.tags or op in UNTAGGED


def pointwise(call: Call) -> Axes:
    """Operands are permuted together; a result written into an operand has that operand's axes."""
    operands = [call.of(n) for n in call.node.all_input_nodes]
    out = broadcast(operands, call.why)
    if call.op in ("aten.cos", "aten.sin"):
        for axis in out:
            for atom in leaves(axis):
                atom.rotary = True
    if call.op.endswith("_") and not call.op.endswith("__"):
        target = call.axes("self")
        for mine, written in zip(target, out[len(out) - len(target) :], strict=True):
            unify(mine, written, call.why) if mine.size == written.size else None
        return list(target)
    return out


@rule(
    "to", "_to_copy", "type_as", "alias", "clone", "contiguous", "detach", "detach_", "lift_fresh_copy", "dropout", "dropout_", "feature_dropout",
    "zero_", "fill_", moves=True,
)  # fmt: skip
def same(call: Call) -> Axes:
    """The first operand, every element by itself; other operands lend a dtype or a device only."""
    first = call.node.args[0]
    assert isinstance(first, fx.Node)
    return list(call.of(first))


@rule("full", "zeros", "ones", "empty", "full_like", "zeros_like", "ones_like", "empty_like", "new_full", "new_zeros", "new_ones", "new_empty", "scalar_tensor")
def constant(call: Call) -> Axes:
    """One value everywhere: any order will do."""
    return [fresh(s) for s in call.out_sizes]


@rule("arange", "linspace", "eye", "tril_indices", "triu_indices")
def ordered(call: Call) -> Axes:
    """Values that follow from their position."""
    return pinned_like(call.out_sizes, f"{call.why} counts positions")
