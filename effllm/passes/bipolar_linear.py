"""Replaces dense linears and embeddings by bipolar-INT ops on packed inputs, as the recipe says."""

from __future__ import annotations

import operator
from dataclasses import replace as with_values
from typing import Any

import torch
from torch import Tensor, fx

from effllm import compat
from effllm.autotune import cost
from effllm.errors import EffllmError
from effllm.lowering import providers
from effllm.lowering.op import Problem, Provider
from effllm.passes.base import Bound, Context, add_input, call, replace, rows_of
from effllm.recipe import Bipolar, Rule
from effllm.report import Decision, PassReport
from effllm.runtime import layouts
from effllm.runtime.formats import bipolar
from effllm.runtime.formats.base import Packed

_GRID_TO_OFFSET = {"symmetric": "none", "integer": "integer", "affine": "affine"}


class BipolarLinear:
    """One Decision per linear or embedding with a parameter for a weight."""

    name = "bipolar_linear"
    requires: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    def run(self, graph: fx.Graph, context: Context) -> PassReport:
        """Rewrite every site that a rule covers."""
        report = PassReport(self.name)
        grad = _needs_grad(graph)
        for node in list(graph.nodes):
            kind = "linear" if node.target in compat.LINEAR else "embedding" if node.target in compat.EMBEDDING else None
            if node.op == "call_function" and kind:
                report.decisions.append(_site(graph, node, kind, grad, context))
        return report


def _needs_grad(graph: fx.Graph) -> bool:
    if not torch.is_grad_enabled():
        return False
    values = (compat.example_value(n) for n in graph.nodes if n.op == "placeholder")
    return any(isinstance(v, Tensor) and v.requires_grad for v in values)


def _module_name(node: fx.Node, weight: fx.Node) -> str:
    """The dotted module name: of the node's module, or read off the weight's source where the call was functional."""
    name, _ = compat.module_of(node)
    return name or compat.source_name(weight)


def _site(graph: fx.Graph, node: fx.Node, kind: str, grad: bool, context: Context) -> Decision:
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    if not isinstance(weight, fx.Node):
        return Decision(node.name, "", "kept", "no-weight", "the weight is not an input of the graph")
    module = _module_name(node, weight)

    def kept(code: str, reason: str, **more: Any) -> Decision:
        return Decision(node.name, module, "kept", code, reason, **more)

    real = compat.real_tensor(weight) if weight.op == "placeholder" else None
    if real is None:
        return kept("computed-weight", "the weight is computed in the graph or is an activation")
    if real.dim() != 2 or not real.is_floating_point():
        return kept("not-a-matrix", f"the weight is {real.dtype} of shape {tuple(real.shape)}")
    shape = (real.shape[0], real.shape[1])
    rule = context.recipe.rule_for(module, kind, shape)
    if rule is None or rule.method == "dense":
        return kept("no-rule" if rule is None else "dense", "no rule of the recipe covers it" if rule is None else "the recipe keeps it dense")
    if grad:
        return kept("grad", "gradients are recorded and the op is for inference only; run under torch.no_grad() or torch.inference_mode()")
    if kind == "embedding" and not _plain_embedding(node):
        return kept("embedding-options", "max_norm, sparse or scale_grad_by_freq is set")
    try:
        return _apply(graph, node, kind, weight, real, module, rule, context)
    except EffllmError as error:
        return Decision(node.name, module, "failed", error.code, error.cause)


def _plain_embedding(node: fx.Node) -> bool:
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return not (given.get("max_norm") or given.get("scale_grad_by_freq") or given.get("sparse"))


def _apply(graph: fx.Graph, node: fx.Node, kind: str, weight: fx.Node, real: Tensor, module: str, rule: Rule, context: Context) -> Decision:
    x = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(x, fx.Node)
    value = compat.example_value(x)
    dtype = value.dtype if kind == "linear" else real.dtype
    act = rule.params.act if kind == "linear" else "a16"
    packed: Packed = context.store.describe(real, rule.params)
    params = with_values(rule.params, offset=_GRID_TO_OFFSET[packed.attrs["grid"]])
    op = "bipolar_linear_a8" if act == "a8" else "bipolar_linear"
    m = rows_of(value) if kind == "linear" else 1
    problem = Problem(op, *packed.shape, params.bits, params.group, "minimum" in packed.tensors, act, m, dtype, real.device.type, packed.tensors["scale"].dtype)
    provider, why = providers.select(problem, context.kernel)
    size = {"bytes_before": real.numel() * real.element_size(), "bytes_after": packed.nbytes}
    config = {"bits": params.bits, "group": params.group, "grid": packed.attrs["grid"], "act": act}
    before, after = _predict(problem, provider) if kind == "linear" else (None, None)
    if before is not None and after is not None and after > before * context.max_slowdown:
        reason = f"predicted {after / before:.2f}x the time of the dense linear at {m} rows"
        return Decision(node.name, module, "kept", "slower", reason, **size, time_before=before, time_after=after, kernel=provider.name, config=config)
    tensors = _bind(graph, weight, packed, params, provider.layout, real.device, context)
    zero = bipolar.zero_point(params.bits, packed.attrs["grid"])
    with graph.inserting_before(node):
        new = _insert(graph, node, kind, x, tensors, packed.shape, params, zero, dtype, act, provider.name)
    replace(context, node, new)
    return Decision(node.name, module, "applied", "applied", why, **size, time_before=before, time_after=after, kernel=provider.name, config=config)


def _predict(problem: Problem, provider: Provider) -> tuple[float | None, float | None]:
    if provider.cost is None:
        return None, None
    dense = cost.seconds(cost.dense(problem.m or 1, problem.n, problem.k, problem.dtype), problem.device)
    return dense, cost.seconds(provider.cost(problem), problem.device)


def _bind(graph: fx.Graph, weight: fx.Node, packed: Packed, params: Bipolar, layout: str, device: torch.device, context: Context) -> dict[str, fx.Node | None]:
    """Placeholders for the packed tensors; a weight used twice in the same way is bound once."""
    for b in context.bound:
        if b.source is weight and b.layout == layout and with_values(b.params, act="a16") == with_values(params, act="a16"):
            return {key: b.nodes.get(key) for key in ("codes", "scale", "minimum")}
    nodes: dict[str, fx.Node] = {}
    shapes = layouts.get(layout).fake_shapes(packed.shape, params.bits, params.group)
    for key in ("codes", "scale", "minimum"):
        if key != "minimum" or "minimum" in packed.tensors:
            shape, dtype = shapes[key]
            nodes[key] = add_input(graph, f"{weight.name}_{key}", shape, dtype or packed.tensors["scale"].dtype, device)
    context.bound.append(Bound(weight, params, layout, nodes))
    return {key: nodes.get(key) for key in ("codes", "scale", "minimum")}


def _insert(
    graph: fx.Graph, node: fx.Node, kind: str, x: fx.Node, w: dict[str, fx.Node | None], shape: tuple[int, int],
    params: Bipolar, zero: float, dtype: torch.dtype, act: str, kernel: str,
) -> fx.Node:  # fmt: skip
    n, k = shape
    three = (w["codes"], w["scale"], w["minimum"])
    if kind == "embedding":
        return call(graph, torch.ops.effllm.bipolar_embedding.default, (x, *three, n, k, params.bits, params.group, zero, dtype, kernel), node)
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    tail = (n, params.bits, params.group, zero)
    if act == "a8":
        pair = call(graph, torch.ops.effllm.quantize_activation.default, (x,), node)
        xq, xs = (graph.call_function(operator.getitem, (pair, i)) for i in (0, 1))
        for i, part in enumerate((xq, xs)):
            compat.set_example_value(part, compat.example_value(pair)[i])
        return call(graph, torch.ops.effllm.bipolar_linear_a8.default, (xq, xs, *three, bias, *tail, dtype, kernel), node)
    return call(graph, torch.ops.effllm.bipolar_linear.default, (x, *three, bias, *tail, kernel), node)
