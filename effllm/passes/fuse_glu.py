"""Gated units: an activation function times another projection becomes one op."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from effllm import compat
from effllm.lowering.glu import GLU
from effllm.passes.base import Context, call, replace
from effllm.passes.match import arguments, erase_unused, is_call, name
from effllm.report import Decision, PassReport


class FuseGlu:
    """One Decision per product with an activation function."""

    name = "fuse_glu"
    requires: tuple[str, ...] = ()
    after: tuple[str, ...] = ("packed_linear", "share_activation", "merge_linear", "merge_lowrank", "sparse_gate")

    def run(self, graph: fx.Graph, context: Context) -> PassReport:
        """Rewrite where both sides have the same shape and dtype, and nothing else reads the activated gate."""
        report = PassReport(self.name)
        for node in list(graph.nodes):
            act = activation(node)
            if not act or compat.erased(node):
                continue
            for user in list(node.users):
                if is_call(user, "mul") and len(user.args) == 2:
                    report.decisions.append(_site(graph, node, act, user, context))
        return report


def activation(node: fx.Node) -> str:
    """The activation that a node is, by its name in lowering/glu.py; empty for any other."""
    found = name(node)
    if found in ("silu", "swish"):
        return "silu"
    if found == "gelu":
        kind = node.kwargs.get("approximate", arguments(node)[1] if len(arguments(node)) > 1 else "none")
        return "gelu" if kind == "none" else "gelu_tanh"
    return found if found == "relu" else ""


def _site(graph: fx.Graph, gate: fx.Node, act: str, product: fx.Node, context: Context) -> Decision:
    module = compat.module_of(product)[0]

    def kept(code: str, reason: str) -> Decision:
        return Decision(product.name, module, "kept", code, reason)

    other = next((a for a in arguments(product) if a is not gate), None)
    source = arguments(gate)[0]
    a, b = (compat.example_value(n) if isinstance(n, fx.Node) else None for n in (source, other))
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return kept("unlike", "gate and factor differ in shape or dtype")
    if len(gate.users) > 1:
        return kept("shared", "something else reads the activated gate")
    with graph.inserting_before(product):
        new = call(graph, getattr(torch.ops.effllm, GLU.name).default, (source, other, act), product)
    replace(context, product, new)
    erase_unused([gate])
    return Decision(new.name, module, "applied", "fused", f"{act} times the other half")
