"""Sibling linears (q, k, v; gate, up) in one kernel call: same activation, same format, outputs side by side.

Nothing is copied: the op takes the packed weights as lists and writes one output that is then split by views. Fewer calls and
fewer thread hand-overs per layer is what decode on a small model is short of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from effllm import compat
from effllm.autotune import use
from effllm.lowering.bipolar_linear import plain
from effllm.lowering.op import OPS
from effllm.passes.base import Context, call, is_op
from effllm.passes.siblings import other_dtype, split
from effllm.report import Decision, PassReport

_ROWS = 16  # outputs of a weight must fill whole tiles


class MergeLinear:
    """Groups bipolar linears by their activation and merges each group of two or more."""

    name = "merge_linear"
    requires: tuple[str, ...] = ()
    after: tuple[str, ...] = ("packed_linear", "share_activation")

    def run(self, graph: fx.Graph, context: Context) -> PassReport:
        """Merge where kernel, bits, group, grid and dtype agree."""
        report = PassReport(self.name)
        groups: dict[tuple[Any, ...], list[fx.Node]] = {}
        order = {n: i for i, n in enumerate(graph.nodes)}
        for node in graph.nodes:
            a8 = is_op(node, "bipolar_linear_a8")
            if a8 or is_op(node, "bipolar_linear"):
                head = 2 if a8 else 1
                minimum, bias, n = node.args[head + 2], node.args[head + 3], node.args[head + 4]
                reason = other_dtype(node, bias) or _obstacle(n, node.args[-1], a8)
                if reason:
                    report.decisions.append(Decision(node.name, compat.module_of(node)[0], "kept", "not-mergeable", reason))
                    continue
                key = (a8, node.args[:head], minimum is None, node.args[head + 5 :])
                groups.setdefault(key, []).append(node)
        for (a8, *_), nodes in groups.items():
            if len(nodes) > 1:
                report.decisions.append(_merge(graph, sorted(nodes, key=order.__getitem__), a8, context))
            else:
                report.decisions.append(_single(nodes[0], a8, groups))
        return report


def _single(node: fx.Node, a8: bool, groups: dict[tuple[Any, ...], list[fx.Node]]) -> Decision:
    """Why a linear found no partner: none reads its activation, or those that do are packed in another way."""
    module = compat.module_of(node)[0]
    other = next((m for (b8, *_), ns in groups.items() for m in ns if b8 == a8 and m is not node and m.args[0] is node.args[0]), None)
    if other is None:
        return Decision(node.name, module, "kept", "alone", "no other linear reads the same activation")
    reason = f"{compat.module_of(other)[0] or other.name} reads the same activation, but its bits, group, grid or kernel differ"
    return Decision(node.name, module, "kept", "unlike", reason)


def _obstacle(n: Any, kernel: Any, a8: bool) -> str:
    if n % _ROWS:
        return f"{n} outputs do not fill tiles of {_ROWS}"
    many = "bipolar_linear_a8_many" if a8 else "bipolar_linear_many"
    return "" if plain(kernel) in OPS[many].providers else f"kernel {plain(kernel)!r} takes one weight at a time"


def _merge(graph: fx.Graph, nodes: list[fx.Node], a8: bool, context: Context) -> Decision:
    head = 2 if a8 else 1
    first = nodes[0]
    lists = [[n.args[head + i] for n in nodes] for i in range(3)]
    if lists[2][0] is None:
        lists[2] = []
    op = torch.ops.effllm.bipolar_linear_a8_many.default if a8 else torch.ops.effllm.bipolar_linear_many.default
    names = [compat.module_of(n)[0] for n in nodes]
    with graph.inserting_before(first):
        merged = call(graph, op, (*first.args[:head], *lists, *first.args[head + 5 :]), first)
    split(graph, context, merged, nodes, lambda node: node.args[head + 3])
    config, note = _found("bipolar_linear_a8_many" if a8 else "bipolar_linear_many", merged)
    reason = "; ".join(filter(None, (f"{len(nodes)} linears in one call", note)))
    return Decision(merged.name, ", ".join(names), "applied", "merged", reason, kernel=plain(str(first.args[-1])), config=config)


def _found(op: str, merged: fx.Node) -> tuple[dict[str, Any], str]:
    """How the configuration of the merged problem, which is not that of its parts, was found."""
    read = OPS[op].problem
    if read is None:
        return {}, ""
    problem, kernel = read(*fx.node.map_arg(merged.args, compat.example_value))
    provider = OPS[op].providers[kernel]
    if provider.tuning is None:
        return {}, ""
    choice = use.choose(provider, problem)
    return {"tuned": choice.source}, choice.reason
