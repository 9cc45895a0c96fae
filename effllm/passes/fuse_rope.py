"""Rotary embedding as models spell it, x cos + rotate_half(x) sin, becomes one op."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from effllm import compat
from effllm.lowering.rotate import ROTATE
from effllm.passes.base import Context, call, replace
from effllm.passes.match import arguments, erase_unused, is_call
from effllm.report import Decision, PassReport


class FuseRope:
    """One Decision per rotation that is found; whether positions are what turns it is not asked."""

    name = "fuse_rope"
    requires: tuple[str, ...] = ()
    after: tuple[str, ...] = ("packed_linear", "query_rotation", "compressed_attention", "attention")

    def run(self, graph: fx.Graph, context: Context) -> PassReport:
        """Rewrite sums of a product and the product of the same values, turned."""
        report = PassReport(self.name)
        for node in list(graph.nodes):
            if not is_call(node, "add") or compat.erased(node) or len(arguments(node)) != 2:
                continue
            found = _rotation(node)
            if found is None:
                continue
            x, cos, sin, interleaved = found
            module = compat.module_of(node)[0]
            with graph.inserting_before(node):
                new = call(graph, getattr(torch.ops.effllm, ROTATE.name).default, (x, cos, sin, interleaved), node)
            if compat.example_value(new).dtype != compat.example_value(node).dtype or compat.example_value(new).shape != compat.example_value(node).shape:
                graph.erase_node(new)
                report.decisions.append(Decision(node.name, module, "kept", "dtype", "its angles widen what they turn"))
                continue
            old = node.all_input_nodes
            if compat.example_value(new).stride() == compat.example_value(node).stride():
                replace(context, node, new)
            else:  # elementwise products keep the strides of a transposed x; who reads them takes either
                node.replace_all_uses_with(new)
                graph.erase_node(node)
            erase_unused(old)
            report.decisions.append(Decision(new.name, module, "applied", "fused", "neighbours" if interleaved else "halves"))
        return report


def _rotation(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, bool] | None:
    """x, cosines, sines and whether neighbours are paired."""
    for first, second in (arguments(node), reversed(arguments(node))):
        if not is_call(first, "mul") or not is_call(second, "mul"):
            return None
        for x, cos in (arguments(first), reversed(arguments(first))):
            for other, sin in (arguments(second), reversed(arguments(second))):
                interleaved = _turned(other, x)
                if interleaved is not None and isinstance(cos, fx.Node) and isinstance(sin, fx.Node):
                    return x, cos, sin, interleaved
    return None


def _turned(node: Any, x: Any) -> bool | None:
    """Whether `node` is x a quarter turn on: False by halves, True by neighbours, None if it is not."""
    if not isinstance(node, fx.Node) or not isinstance(x, fx.Node) or not isinstance(compat.example_value(x), Tensor):
        return None
    size = compat.example_value(x).shape[-1]
    if is_call(node, "cat") and len(arguments(node)) and (node.kwargs.get("dim", arguments(node)[1] if len(arguments(node)) > 1 else 0)) == -1:
        low, high = slice(None, size // 2, None), slice(size // 2, None, None)
        return False if size % 2 == 0 and _quarter(arguments(node)[0], x, high, low) else None
    if is_call(node, "flatten") and arguments(node)[1:2] == (-2,) and is_call(arguments(node)[0], "stack"):
        stack = arguments(node)[0]
        if stack.kwargs.get("dim", arguments(stack)[1] if len(arguments(stack)) > 1 else 0) != -1:
            return None
        return True if _quarter(arguments(stack)[0], x, slice(1, None, 2), slice(None, None, 2)) else None
    return None


def _quarter(parts: Any, x: fx.Node, negative: slice, positive: slice) -> bool:
    """Whether two parts are -x[..., negative] and x[..., positive]."""
    if not isinstance(parts, tuple | list) or len(parts) != 2 or not is_call(parts[0], "neg"):
        return False
    return _slice_of(arguments(parts[0])[0], x, negative) and _slice_of(parts[1], x, positive)


def _slice_of(node: Any, x: fx.Node, wanted: slice) -> bool:
    if not isinstance(node, fx.Node) or node.target is not operator.getitem or arguments(node)[0] is not x or not isinstance(arguments(node)[1], tuple):
        return False
    *lead, last = arguments(node)[1]
    ranks = compat.example_value(x).dim()
    whole = lead == [Ellipsis] or (len(lead) == ranks - 1 and all(i == slice(None) for i in lead))
    start = last.start or 0 if isinstance(last, slice) else None
    return whole and isinstance(last, slice) and start == (wanted.start or 0) and last.stop == wanted.stop and (last.step or 1) == (wanted.step or 1)
