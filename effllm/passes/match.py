"""Reading small patterns off a Dynamo graph, whichever way a model spells them: `a * b`, torch.mul(a, b), a.mul(b)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, fx

from effllm import compat

_SAME = {"iadd": "add", "imul": "mul", "concat": "cat", "multiply": "mul", "true_divide": "div", "truediv": "div", "negative": "neg"}
_CASTS = ("to", "float", "type_as", "bfloat16", "half", "type")


def name(node: Any) -> str:
    """The operation of a call node by its plain name, in-place forms apart; empty for other nodes."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return ""
    found = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if isinstance(node.target, str) and found.endswith("_") and not found.startswith("__"):
        return found
    return _SAME.get(found, found)


def arguments(node: Any) -> Any:
    """A node's positional arguments, for code that has looked at what they are."""
    return node.args


def is_call(node: Any, *names: str) -> bool:
    """Whether a node calls one of the operations."""
    return name(node) in names


def cast(node: Any) -> fx.Node | None:
    """What a node changes to another dtype (or leaves in its own); None where it does anything else."""
    if not is_call(node, *_CASTS):
        return None
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return None
    a, b = compat.example_value(source), compat.example_value(node)
    fits = isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.device == b.device
    return source if fits else None


def uncast(node: Any) -> Any:
    """The node behind any changes of dtype."""
    while (source := cast(node)) is not None:
        node = source
    return node


def pair(node: fx.Node, test: Callable[[Any], bool]) -> tuple[Any, Any] | None:
    """Two operands of a commutative node, the one that passes the test first; None where none does, or there are options."""
    if len(node.args) != 2 or node.kwargs:
        return None
    a, b = node.args
    return (a, b) if test(a) else (b, a) if test(b) else None


def only_user(node: fx.Node) -> fx.Node | None:
    """The one user of a node; None where there are more or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def erase_unused(nodes: Iterable[fx.Node]) -> None:
    """Erase nodes without users, and what only they used; inputs and in-place operations stay."""
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node.op in ("placeholder", "output") or compat.erased(node) or node.users or writes(node):
            continue
        before = node.all_input_nodes
        node.graph.erase_node(node)
        todo += before


def writes(node: fx.Node) -> bool:
    """Whether a node changes an input in place."""
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    return node.op == "call_function" and (node.target is operator.setitem or compat.is_mutation(node.target))


def changed(node: fx.Node) -> list[fx.Node]:
    """The inputs that a node changes in place."""
    if not writes(node):
        return []
    schema = getattr(getattr(node.target, "default", node.target), "_schema", None)
    given = [a for a, about in zip(node.args, schema.arguments, strict=False) if about.alias_info is not None and about.alias_info.is_write] if schema else []
    return [a for a in given if isinstance(a, fx.Node)] or node.all_input_nodes[:1]
