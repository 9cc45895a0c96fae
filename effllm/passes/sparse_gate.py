"""Joins the gate of an MLP with its up projection: rows of the up projection whose gate is small are not computed at all.

Where a model's activation function carries thresholds (CATS, CHESS), `act * up(x)` becomes one op that reads the rows of the up
projection that the gate leaves. A linear that is gate and up in one (Phi) is split: two views of its rows, nothing is copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from effllm import compat
from effllm.autotune import dense
from effllm.lowering import providers, sparse_linear
from effllm.lowering.bipolar_linear import stamped
from effllm.lowering.op import OPS, rows_of
from effllm.passes.base import Context, call, is_op, replace
from effllm.passes.roles import Gated, roles
from effllm.passes.sites import read
from effllm.report import Decision, PassReport

_INWARDS = ("sparse_linear", "sparse_bipolar_linear", "rsparse_linear")
_OUTWARDS = ("sparse_up_linear", "sparse_up_bipolar_linear")


class SparseGate:
    """One Decision per gated MLP with thresholds, and per linear that has more rows than skipping pays for."""

    name = "sparse_gate"
    requires: tuple[str, ...] = ()
    after: tuple[str, ...] = ("packed_linear",)

    def run(self, graph: fx.Graph, context: Context) -> PassReport:
        """Join where the number of rows is static and small."""
        report = PassReport(self.name)
        if not any(is_op(n, name) for n in graph.nodes for name in ("sparsify", *_INWARDS, *_OUTWARDS)):
            act = context.recipe.act
            if act is not None and act.sparsity > 0:
                why = f"{act.name} needs thresholds, which a backend does not have; use effllm.compress(model, recipe, calibration) before compiling"
                report.decisions.append(Decision("", "", "kept", "calibration", why))
            return report
        for node in graph.nodes:
            if any(is_op(node, name) for name in _INWARDS):
                report.decisions.append(_linear(node))
        for block in roles(graph).gated:
            if is_op(block.act, "sparsify"):
                report.decisions.append(_block(graph, block, context))
        return report


def _linear(node: fx.Node) -> Decision:
    """What a linear with thresholds does in this graph."""
    names = compat.argument_names(node.target)
    limit, module = node.args[names.index("limit")], compat.module_of(node)[0]
    x = node.args[0]
    assert isinstance(x, fx.Node) and isinstance(limit, int)
    m = rows_of(compat.example_value(x))
    op = str(node.target).split(".")[1]
    if m is not None and 0 <= limit < m:
        return Decision(node.name, module, "kept", "rows", f"{m} rows, skipping pays up to {limit}: a dense product")
    why = f"{'a dynamic number of' if m is None else m} rows: small inputs are skipped"
    return Decision(node.name, module, "kept", "sparse", why, kernel=str(node.args[-1]).partition("#")[0], config={"op": op})


def _block(graph: fx.Graph, block: Gated, context: Context) -> Decision:
    node, module = block.product, block.up.module
    value = compat.example_value(node)
    gate, threshold, limit = block.act.args
    m = rows_of(value)
    assert isinstance(limit, int) and isinstance(gate, fx.Node)

    def kept(code: str, reason: str, **more: Any) -> Decision:
        return Decision(node.name, module, "kept", code, reason, **more)

    if m is None:
        return kept("dynamic", "the number of rows is dynamic: the gate is masked, rows of the up projection are all computed")
    if 0 <= limit < m:
        return kept("rows", f"{m} rows, skipping pays up to {limit}: dense")
    up = block.up.node
    site = read(up)
    coded = is_op(up, "sparse_up_bipolar_linear")
    if site is None and not coded and not is_op(up, "sparse_up_linear"):
        return kept("packed", "the up projection is packed in a form that is not read row by row")
    if torch.is_grad_enabled() and any(compat.example_value(n).requires_grad for n in (gate, block.up.x)):
        return kept("grad", "gradients are recorded and the op is for inference only")
    if site is not None and site.transposed:
        return kept("transposed", "the weight is held as (in, out), which is not read row by row")
    if site is None:
        op = "sparse_up_bipolar_linear" if coded else "sparse_up_linear"
        args = (up.args[0], gate, threshold, *up.args[3:])
        problem = OPS[op].problem
        assert problem is not None
        found, _ = problem(*fx.node.map_arg(args, compat.example_value))
        provider, why = OPS[op].providers[str(up.args[-1]).partition("#")[0]], "as the weight is laid out"
    else:
        op = "sparse_up_linear"
        w = compat.example_value(site.weight)
        n = value.shape[-1]
        found = sparse_linear.problem(op, n, w.shape[1], m=m, dtype=value.dtype, device=value.device.type, values=w.dtype, limit=limit)
        provider, why = providers.select(found, context.kernel if context.kernel in OPS[op].providers else None)
    config = {"op": op, "rows": m, "split": block.fused}
    if provider.name == "reference":
        return kept("no-kernel", f"no kernel skips rows here: {why}", config=config)
    before = after = None
    if provider.tuning is not None:
        before, after = dense.seconds(found), provider.tuning.predict(found, provider.tuning.first(found)).seconds
        if site is not None and after > before * context.max_slowdown:
            reason = f"predicted {after / before:.2f}x the time of the dense linear at {m} rows"
            return kept("slower", reason, time_before=before, time_after=after, kernel=provider.name, config=config)
    with graph.inserting_before(node):
        if site is not None:
            weight, bias, gate = _split(graph, block, gate, site.weight, site.bias) if block.fused else (site.weight, site.bias, gate)
            args = (block.up.x, gate, threshold, weight, bias, limit, stamped(provider))
        new = call(graph, getattr(torch.ops.effllm, op).default, args, node)
    unused = [block.act, block.up_value, *block.up_value.all_input_nodes, up]
    replace(context, node, new)
    for old in unused:
        _drop(graph, old)
    return Decision(new.name, module, "applied", "joined", why, time_before=before, time_after=after, kernel=provider.name, config=config)


def _split(graph: fx.Graph, block: Gated, act: fx.Node, weight: Any, bias: Any) -> tuple[fx.Node, fx.Node | None, fx.Node]:
    """Up half of a fused weight and bias, and the activation of a gate that reads the other half's rows alone."""
    assert block.half is not None
    n = compat.example_value(weight).shape[0] // 2

    def half(t: Any, which: int) -> Any:
        return None if t is None else call(graph, torch.narrow, (t, 0, which * n, n))

    source = act.args[0]
    assert isinstance(source, fx.Node)
    linear = call(graph, torch._C._nn.linear, (block.gate.x, half(weight, 1 - block.half), half(bias, 1 - block.half)), block.gate.node)
    activated = graph.call_function(act.target, (linear, *act.args[1:]), dict(act.kwargs))  # type: ignore[arg-type]
    activated.meta.update(act.meta)
    return half(weight, block.half), half(bias, block.half), activated


def _drop(graph: fx.Graph, node: fx.Node) -> None:
    """Erase what nothing reads any more, and what it alone read."""
    if node.users or node.op not in ("call_function", "call_method") or node not in graph.nodes:
        return
    sources = node.all_input_nodes
    graph.erase_node(node)
    for s in sources:
        _drop(graph, s)


