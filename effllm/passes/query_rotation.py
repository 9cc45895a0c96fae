"""Attention over keys that are turned as they are read goes to one kernel that turns the query instead: q . R(a) k = R(-a) q . k.

What an edit session's cache gives to attention is `pie_apply(keys as stored, rows, angles)`, which is right in any graph but writes all
keys once more at every step. Few queries are cheaper to turn than many keys, and turned in fp32 they round nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from effllm import compat
from effllm.lowering import providers
from effllm.lowering.pie import attention_problem
from effllm.passes.base import Context, call, is_op, replace
from effllm.passes.attention import MAX_QUERIES, NAMES, grouped
from effllm.report import Decision, PassReport


class QueryRotation:
    """One Decision per attention over turned keys; other attentions are not its business."""

    name = "query_rotation"
    requires: tuple[str, ...] = ()
    after: tuple[str, ...] = ("compressed_attention",)  # which takes the keys of packed caches itself

    def run(self, graph: fx.Graph, context: Context) -> PassReport:
        """Replace where the number of queries is static and small."""
        report = PassReport(self.name)
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target in compat.ATTENTION:
                given: dict[str, Any] = dict(zip(NAMES, node.args, strict=False)) | dict(node.kwargs)
                turned = grouped(given["key"])
                if is_op(turned, "pie_apply"):
                    report.decisions.append(_site(graph, node, given, turned, context))
        return report


def _site(graph: fx.Graph, node: fx.Node, given: dict[str, Any], turned: fx.Node, context: Context) -> Decision:
    module, _ = compat.module_of(node)

    def kept(code: str, reason: str) -> Decision:
        return Decision(node.name, module, "kept", code, reason)

    operands: tuple[Any, ...] = turned.args
    stored, source, row, cos, sin, layout, _ = operands
    q, v, mask = given["query"], grouped(given["value"]), given.get("attn_mask")
    query, keys = compat.example_value(q), compat.example_value(stored)
    if torch.is_grad_enabled() and any(compat.example_value(t).requires_grad for t in (q, stored, v)):
        return kept("grad", "gradients are recorded and the op is for inference only")
    if source is not None:
        return kept("gathered", "keys are gathered too")
    if query.dim() != 4 or not isinstance(query.shape[2], int) or query.shape[2] > MAX_QUERIES:
        return kept("many-queries", f"{query.shape[-2]} queries: turning the keys once is cheaper")
    if given.get("dropout_p") or given.get("is_causal"):
        return kept("options", "dropout or is_causal is set")
    if mask is not None and compat.example_value(mask).dim() != 4:
        return kept("mask", "the mask is not 4-dimensional")
    if keys.shape != compat.example_value(v).shape:
        return kept("shapes", "keys and values differ in shape")
    provider, why = providers.select(attention_problem(query, compat.example_value(cos).shape[1]))
    scale = given.get("scale")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    with graph.inserting_before(node):
        new = call(graph, torch.ops.effllm.rotated_attention.default, (q, stored, v, mask, row, cos, sin, layout, scale, provider.name), node)
    context.changed.append(new)
    if tuple(compat.example_value(new).stride()) == tuple(compat.example_value(node).stride()):
        replace(context, node, new)
    else:  # torch's kernel may leave heads innermost; consumers reshape, which takes either
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    dead: fx.Node | None = given["key"]
    while dead is not None and not dead.users:  # the repetition of keys, and the turned keys themselves
        before = None if dead is turned else dead.all_input_nodes[0]
        graph.erase_node(dead)
        dead = before
    config = {"queries": query.shape[2], "table": compat.example_value(cos).shape[0]}
    return Decision(new.name, module, "applied", "applied", why, kernel=provider.name, config=config)
