"""Graph nodes that are mere views of memory, as step programs see them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from effllm import compat
from effllm.passes.match import arguments, cast, name

_VIEWS = ("view", "transpose", "permute", "expand", "unsqueeze", "squeeze", "narrow", "select", "t", "chunk", "split", "unbind", "getitem",
          "expand_as", "view_as")  # fmt: skip
MAYBE = ("reshape", "contiguous", "flatten", "unflatten")


class Unsupported(Exception):
    """A node that the program cannot hold after all."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


def views(node: fx.Node) -> bool:
    """Whether a node's value is memory of its input: a view, an item of several values, or a cast to what it is already."""
    found = node.meta.get("effllm_view")
    if found is None:
        found = node.meta["effllm_view"] = _views(node)
    return bool(found)


def _views(node: fx.Node) -> bool:
    what = name(node)
    if not what or not arguments(node) or not isinstance(arguments(node)[0], fx.Node):
        return False
    base = compat.example_value(arguments(node)[0])
    if isinstance(base, tuple | list):
        return what == "getitem"
    if not isinstance(base, Tensor):
        return False
    if what == "getitem":
        index = arguments(node)[1] if isinstance(arguments(node)[1], tuple) else (arguments(node)[1],)
        return all(i is None or i is Ellipsis or isinstance(i, int | slice) for i in index) and not any(_symbolic(i) for i in index)
    if what in _VIEWS:
        return True
    if what == "dropout":
        return not node.kwargs.get("training", arguments(node)[2] if len(arguments(node)) > 2 else True)
    if what in MAYBE:
        try:
            like = _meta(base)
            return compat.same_storage(applied(node, like), like)
        except (RuntimeError, TypeError):
            return False
    source = cast(node)
    return source is not None and compat.example_value(source).dtype == compat.example_value(node).dtype and not node.kwargs.get("copy", False)


def _symbolic(index: Any) -> bool:
    return isinstance(index, slice) and any(isinstance(i, fx.Node | torch.SymInt) for i in (index.start, index.stop, index.step))


def _meta(value: Tensor) -> Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def applied(node: fx.Node, base: Tensor) -> Any:
    """The node's operation on a meta tensor."""
    args = fx.node.map_arg(arguments(node)[1:], lambda n: _meta(compat.example_value(n)))
    if isinstance(node.target, str):
        return getattr(base, node.target)(*args, **node.kwargs)
    return node.target(base, *args, **node.kwargs)
