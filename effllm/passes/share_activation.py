"""One activation quantization per activation: q, k and v (gate and up) read the same codes."""

from __future__ import annotations

import operator

from torch import fx

from effllm.passes.base import Context, is_op
from effllm.report import Decision, PassReport


class ShareActivation:
    """Merges quantize_activation nodes that quantize the same value."""

    name = "share_activation"
    requires: tuple[str, ...] = ()
    after: tuple[str, ...] = ("packed_linear",)

    def run(self, graph: fx.Graph, context: Context) -> PassReport:
        """Keep the first of each and reroute the others."""
        report = PassReport(self.name)
        first: dict[fx.Node, fx.Node] = {}
        for node in list(graph.nodes):
            if not is_op(node, "quantize_activation"):
                continue
            x = node.args[0]
            assert isinstance(x, fx.Node)
            kept = first.setdefault(x, node)
            if kept is node:
                continue
            node.replace_all_uses_with(kept)
            graph.erase_node(node)
            report.decisions.append(Decision(node.name, "", "applied", "shared", f"same input as {kept.name}"))
        _share_items(graph)
        return report


def _share_items(graph: fx.Graph) -> None:
    """getitem of the same pair and index is the same tensor; later passes compare nodes by identity."""
    seen: dict[tuple[fx.Node, int], fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not operator.getitem:
            continue
        source = node.args[0]
        if not (isinstance(source, fx.Node) and is_op(source, "quantize_activation")):
            continue
        kept = seen.setdefault((source, int(node.args[1])), node)  # type: ignore[call-overload]
        if kept is not node:
            node.replace_all_uses_with(kept)
            graph.erase_node(node)
