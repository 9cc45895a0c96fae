"""Sibling low-rank linears (q, k, v; gate, up) in one call: their first stages read the same x, so they run as one.

Dense factors may be plain or have pivoted rows, all alike; bipolar factors must fill whole tiles. What the linears had in common decides,
as in merge_linear; outputs lie side by side and are split by views.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from effllm import compat
from effllm.lowering.bipolar_linear import plain
from effllm.lowering.op import OPS
from effllm.passes.base import Context, call, is_op
from effllm.passes.siblings import other_dtype, split
from effllm.report import Decision, PassReport

_ROWS = 16  # rows of a tile
Lists = Callable[[list[fx.Node]], tuple[Any, ...]]


class MergeLowRank:
    """Groups low-rank linears by their activation and merges each group of two or more."""

    name = "merge_lowrank"
    requires: tuple[str, ...] = ()
    after: tuple[str, ...] = ("packed_linear",)

    def run(self, graph: fx.Graph, context: Context) -> PassReport:
        """Merge where kernel, form and grids agree."""
        report = PassReport(self.name)
        groups: dict[tuple[Any, ...], list[fx.Node]] = {}
        for node in graph.nodes:
            if is_op(node, "lowrank_linear") or is_op(node, "lowrank_bipolar_linear"):
                reason = _obstacle(node)
                if reason:
                    report.decisions.append(Decision(node.name, compat.module_of(node)[0], "kept", "not-mergeable", reason))
                    continue
                groups.setdefault(_key(node), []).append(node)
        for nodes in groups.values():
            if len(nodes) > 1:
                report.decisions.append(_merge(graph, nodes, context))
            else:
                reason = "no other low-rank linear of its form reads the same activation"
                report.decisions.append(Decision(nodes[0].name, compat.module_of(nodes[0])[0], "kept", "alone", reason))
        return report


def _dense(node: fx.Node) -> bool:
    return is_op(node, "lowrank_linear")


def _key(node: fx.Node) -> tuple[Any, ...]:
    a: tuple[Any, ...] = node.args
    if _dense(node):
        return True, a[0], a[4] is None, compat.example_value(a[1]).dtype, a[-1]
    return False, a[0], a[3] is None, a[6] is None, a[11:]


def _obstacle(node: fx.Node) -> str:
    a = node.args
    many = "lowrank_linear_many" if _dense(node) else "lowrank_bipolar_linear_many"
    if plain(str(a[-1])) not in OPS[many].providers:
        return f"kernel {plain(str(a[-1]))!r} takes one weight at a time"
    if _dense(node):
        return other_dtype(node, _bias(node)) or ("it has input channels of its own" if a[3] is not None else "")
    pivots, _, n, rank = a[7:11]
    if pivots is not None:
        return "its rows are pivoted, which takes two calls"
    if reason := other_dtype(node, _bias(node)):
        return reason
    return "" if int(n) % _ROWS == 0 and int(rank) % _ROWS == 0 else f"{n} outputs and rank {rank} do not fill tiles of {_ROWS}"  # type: ignore[arg-type]


def _bias(node: fx.Node) -> Any:
    return node.args[5] if _dense(node) else node.args[8]


def _merge(graph: fx.Graph, nodes: list[fx.Node], context: Context) -> Decision:
    first = nodes[0]
    columns = list(zip(*(n.args for n in nodes), strict=True))
    args: tuple[Any, ...]
    if _dense(first):
        pivots = [] if first.args[4] is None else list(columns[4])
        op, args = torch.ops.effllm.lowrank_linear_many.default, (first.args[0], list(columns[1]), list(columns[2]), pivots, first.args[-1])
    else:
        lists = [[] if c[0] is None else list(c) for c in columns[1:7]]
        op, args = torch.ops.effllm.lowrank_bipolar_linear_many.default, (first.args[0], *lists, *first.args[11:])
    names = [compat.module_of(n)[0] for n in nodes]
    with graph.inserting_before(first):
        merged = call(graph, op, args, first)
    split(graph, context, merged, nodes, _bias)
    return Decision(merged.name, ", ".join(names), "applied", "merged", f"{len(nodes)} low-rank linears in one call", kernel=plain(str(first.args[-1])))
