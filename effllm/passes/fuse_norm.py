"""RMS norms that are spelled out (square, mean, rsqrt, product, weight) become one op each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from effllm import compat
from effllm.lowering.norm import RMS_NORM
from effllm.passes.base import Context, call, replace
from effllm.passes.match import arguments, cast, erase_unused, is_call, only_user, pair, uncast
from effllm.report import Decision, PassReport


class FuseNorm:
    """One Decision per reciprocal square root of a mean."""

    name = "fuse_norm"
    requires: tuple[str, ...] = ()
    after: tuple[str, ...] = ("packed_linear", "share_activation", "merge_linear", "merge_lowrank", "sparse_gate", "query_rotation")

    def run(self, graph: fx.Graph, context: Context) -> PassReport:
        """Rewrite where the whole pattern is there and nothing else reads its middle."""
        report = PassReport(self.name)
        for node in list(graph.nodes):
            if is_call(node, "rsqrt") and not compat.erased(node):
                found = _root(node)
                if found is not None:
                    report.decisions.append(_site(graph, node, *found, context))
        return report


def _number(x: Any) -> bool:
    return isinstance(x, int | float)


def _root(node: fx.Node) -> tuple[fx.Node, float] | None:
    """x (in fp32) and eps of rsqrt(mean(x^2) + eps) over the last dimension."""
    added = arguments(node)[0]
    parts = pair(added, _number) if is_call(added, "add") else None
    if parts is None or not is_call(parts[1], "mean"):
        return None
    eps, mean = parts
    dim = arguments(mean)[1] if len(arguments(mean)) > 1 else mean.kwargs.get("dim")
    keep = arguments(mean)[2] if len(arguments(mean)) > 2 else mean.kwargs.get("keepdim", False)
    square = arguments(mean)[0]
    if dim not in (-1, (-1,), [-1]) or not keep or not isinstance(square, fx.Node):
        return None
    x, *other = arguments(square)
    if not (is_call(square, "square") or (is_call(square, "pow") and other == [2]) or (is_call(square, "mul") and other == [x])):
        return None
    return (x, float(eps)) if isinstance(x, fx.Node) else None


def _site(graph: fx.Graph, node: fx.Node, x: fx.Node, eps: float, context: Context) -> Decision:
    module = compat.module_of(node)[0]

    def kept(code: str, reason: str) -> Decision:
        return Decision(node.name, module, "kept", code, reason)

    if compat.example_value(x).dtype != torch.float32:
        return kept("dtype", f"its sum is taken in {compat.example_value(x).dtype}")
    normed = only_user(node)
    if not is_call(normed, "mul") or x not in arguments(normed):
        return kept("pattern", "what follows is not the product with the same values")
    assert normed is not None
    source = uncast(x)
    dtype = compat.example_value(source).dtype
    last, weight, offset, late = _weighted(normed, dtype)
    if weight is None:
        return kept("no-weight", "no product with a weight of one dimension follows")
    if late and offset and not _fp32(weight.users):
        return kept("dtype", "the weight is not widened before something is added to it")
    with graph.inserting_before(last):
        new = call(graph, getattr(torch.ops.effllm, RMS_NORM.name).default, (source, weight, eps, offset, late), last)
    if compat.example_value(new).dtype != compat.example_value(last).dtype:
        graph.erase_node(new)
        return kept("dtype", f"it gives {compat.example_value(last).dtype} for {dtype}")
    old = last.all_input_nodes
    replace(context, last, new)
    erase_unused(old)
    return Decision(new.name, module, "applied", "fused", "one op", config={"eps": eps, "offset": offset})


def _fp32(users: Any) -> bool:
    return any(is_call(u, "float", "to") for u in users)


def _weighted(normed: fx.Node, dtype: torch.dtype) -> tuple[fx.Node, fx.Node | None, float, bool]:
    """The last node of the norm, its weight, what is added to the weight, and whether rounding comes after the product."""
    early = only_user(normed)
    rounded = early if early is not None and cast(early) is normed and compat.example_value(early).dtype == dtype else None
    for at, late in ((rounded, False), (normed, True)):
        product = only_user(at) if at is not None else None
        if product is None or not is_call(product, "mul"):
            continue
        other = [a for a in arguments(product) if a is not at]
        weight, offset = _weight(other[0]) if len(other) == 1 else (None, 0.0)
        if weight is None or (offset and not late):
            continue
        if not late or dtype == torch.float32:
            return product, weight, offset, late and bool(offset)
        end = only_user(product)
        if end is not None and cast(end) is product and compat.example_value(end).dtype == dtype:
            return end, weight, offset, True
    return normed, None, 0.0, False


def _weight(node: Any) -> tuple[fx.Node | None, float]:
    """A vector, or a number plus a vector."""
    offset = 0.0
    if is_call(node, "add"):
        parts = pair(node, _number)
        if parts is None:
            return None, 0.0
        offset, node = float(parts[0]), parts[1]
        node = uncast(node)
    elif isinstance(node, fx.Node):
        node = uncast(node)
    value = compat.example_value(node) if isinstance(node, fx.Node) else None
    return (node, offset) if isinstance(value, Tensor) and value.dim() == 1 else (None, 0.0)
