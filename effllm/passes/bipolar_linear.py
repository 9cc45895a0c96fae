"""Replaces dense linears and embeddings by bipolar-INT ops on packed inputs, as the recipe says.

A linear is a linear node, or addmm of a vector and a parameter that is held as (in, out): what Conv1D of GPT-2 comes to.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from dataclasses import replace as with_values
from typing import Any

import torch
from torch import Tensor, fx, nn

from effllm import compat
from effllm.autotune import dense, use
from effllm.errors import EffllmError
from effllm.lowering import providers
from effllm.lowering.bipolar_linear import stamped
from effllm.lowering.op import Problem, Provider, rows_of
from effllm.passes.base import Bound, Context, add_input, call, replace
from effllm.recipe import Bipolar, Rule
from effllm.report import Decision, PassReport
from effllm.runtime import layouts
from effllm.runtime.formats import bipolar
from effllm.runtime.formats.base import Packed

_GRID_TO_OFFSET = {"symmetric": "none", "integer": "integer", "affine": "affine"}


@dataclass(frozen=True)
class _Site:
    """A node to look at: y = x W^T + bias ("linear") or rows x of W ("embedding"); `transposed`: W is held as (in, out)."""

    node: fx.Node
    kind: str
    x: fx.Node
    weight: Any
    bias: Any = None
    transposed: bool = False


class BipolarLinear:
    """One Decision per linear or embedding with a parameter for a weight, and per parameter that other ops read."""

    name = "bipolar_linear"
    requires: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    def run(self, graph: fx.Graph, context: Context) -> PassReport:
        """Rewrite every site that a rule covers."""
        report = PassReport(self.name)
        grad = _needs_grad(graph)
        for node in list(graph.nodes):
            site = _read(node)
            if site is not None:
                report.decisions.append(_site(graph, site, grad, context))
        report.decisions += _others(graph)
        return report


def _read(node: fx.Node) -> _Site | None:
    """The site that a node is, if it is one."""
    if node.op != "call_function":
        return None

    def given(*names: str) -> list[Any]:
        values = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        return [values.get(n) for n in names]

    if node.target in compat.LINEAR:
        x, weight, bias = given("input", "weight", "bias")
        return _Site(node, "linear", x, weight, bias)
    if node.target in compat.EMBEDDING:
        x, weight = given("input", "weight")
        return _Site(node, "embedding", x, weight)
    if node.target in compat.ADDMM and not {"alpha", "beta"} & set(node.kwargs):
        bias, x, weight = given("input", "mat1", "mat2")
        held = isinstance(weight, fx.Node) and weight.op == "placeholder" and isinstance(compat.real_tensor(weight), nn.Parameter)
        if held and isinstance(bias, fx.Node) and compat.example_value(bias).dim() == 1 and isinstance(x, fx.Node):
            return _Site(node, "linear", x, weight, bias, transposed=True)
    return None


def _others(graph: fx.Graph) -> list[Decision]:
    """Parameters of two or more dimensions that ops other than the sites read: stacked experts, convolutions, plain products."""
    found = []
    for node in graph.nodes:
        real = compat.real_tensor(node) if node.op == "placeholder" else None
        if not isinstance(real, nn.Parameter) or real.dim() < 2 or not real.is_floating_point():
            continue
        users = [u for u in node.users if u.op != "output" and _read(u) is None]
        if users:
            names = sorted({u.target if isinstance(u.target, str) else getattr(u.target, "__name__", str(u.target)) for u in users})
            reason = f"a parameter of shape {tuple(real.shape)} that {', '.join(names)} reads; only linear, embedding and addmm with a vector are rewritten"
            found.append(Decision(node.name, compat.parameter_name(node), "kept", "other-op", reason))
    return found


def _needs_grad(graph: fx.Graph) -> bool:
    if not torch.is_grad_enabled():
        return False
    values = (compat.example_value(n) for n in graph.nodes if n.op == "placeholder")
    return any(isinstance(v, Tensor) and v.requires_grad for v in values)


def _module_name(node: fx.Node, weight: fx.Node) -> str:
    """The dotted module name: of the node's module, or read off the weight's source where the call was functional."""
    name, _ = compat.module_of(node)
    return name or compat.source_name(weight)


def _site(graph: fx.Graph, site: _Site, grad: bool, context: Context) -> Decision:
    node, kind, weight = site.node, site.kind, site.weight
    if not isinstance(weight, fx.Node):
        return Decision(node.name, "", "kept", "no-weight", "the weight is not an input of the graph")
    module = _module_name(node, weight)

    def kept(code: str, reason: str, **more: Any) -> Decision:
        return Decision(node.name, module, "kept", code, reason, **more)

    real = compat.real_tensor(weight) if weight.op == "placeholder" else None
    if real is None:
        return kept("computed-weight", "the weight is computed in the graph or is an activation")
    if not compat.is_weight(weight, real):
        return kept("no-parameter", "the weight is an argument of the call, not a parameter or buffer of a module")
    if real.dim() != 2 or not real.is_floating_point():
        return kept("not-a-matrix", f"the weight is {real.dtype} of shape {tuple(real.shape)}")
    shape = (real.shape[1], real.shape[0]) if site.transposed else (real.shape[0], real.shape[1])
    rule = context.recipe.rule_for(module, kind, shape)
    if rule is None or rule.method == "dense":
        return kept("no-rule" if rule is None else "dense", "no rule of the recipe covers it" if rule is None else "the recipe keeps it dense")
    if grad:
        return kept("grad", "gradients are recorded and the op is for inference only; run under torch.no_grad() or torch.inference_mode()")
    if kind == "embedding" and not _plain_embedding(node):
        return kept("embedding-options", "max_norm, sparse or scale_grad_by_freq is set")
    try:
        return _apply(graph, site, real, module, rule, context)
    except EffllmError as error:
        return Decision(node.name, module, "failed", error.code, error.cause)


def _plain_embedding(node: fx.Node) -> bool:
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return not (given.get("max_norm") or given.get("scale_grad_by_freq") or given.get("sparse"))


def _apply(graph: fx.Graph, site: _Site, real: Tensor, module: str, rule: Rule, context: Context) -> Decision:
    node, kind = site.node, site.kind
    value = compat.example_value(site.x)
    dtype = value.dtype if kind == "linear" else real.dtype
    act = rule.params.act if kind == "linear" else "a16"
    packed: Packed = context.store.describe(real, rule.params, transposed=site.transposed)
    params = with_values(rule.params, offset=_GRID_TO_OFFSET[packed.attrs["grid"]])
    op = "bipolar_linear_a8" if act == "a8" else "bipolar_linear"
    m = rows_of(value) if kind == "linear" else 1
    problem = Problem(op, *packed.shape, params.bits, params.group, "minimum" in packed.tensors, act, m, dtype, real.device.type, packed.tensors["scale"].dtype)
    provider, why = providers.select(problem, context.kernel)
    size = {"bytes_before": real.numel() * real.element_size(), "bytes_after": packed.nbytes}
    config = {"bits": params.bits, "group": params.group, "grid": packed.attrs["grid"], "act": act}
    before, after = _predict(problem, provider) if kind == "linear" else (None, None)
    if kind == "linear" and provider.tuning is not None:
        choice = use.choose(provider, problem)
        config["tuned"] = choice.source
        why = "; ".join(filter(None, (why, choice.reason)))
    if before is not None and after is not None and after > before * context.max_slowdown:
        reason = f"predicted {after / before:.2f}x the time of the dense linear at {m} rows"
        return Decision(node.name, module, "kept", "slower", reason, **size, time_before=before, time_after=after, kernel=provider.name, config=config)
    tensors = _bind(graph, site, packed, params, provider.layout, real.device, context)
    zero = bipolar.zero_point(params.bits, packed.attrs["grid"])
    with graph.inserting_before(node):
        new = _insert(graph, site, tensors, packed.shape, params, zero, dtype, act, stamped(provider))
    replace(context, node, new)
    return Decision(node.name, module, "applied", "applied", why, **size, time_before=before, time_after=after, kernel=provider.name, config=config)


def _predict(problem: Problem, provider: Provider) -> tuple[float | None, float | None]:
    if provider.tuning is None:
        return None, None
    return dense.seconds(problem), provider.tuning.predict(problem, provider.tuning.first(problem)).seconds


def _bind(graph: fx.Graph, site: _Site, packed: Packed, params: Bipolar, layout: str, device: torch.device, context: Context) -> dict[str, fx.Node | None]:
    """Placeholders for the packed tensors; a weight used twice in the same way is bound once."""
    for b in context.bound:
        same = b.source is site.weight and b.layout == layout and b.transposed == site.transposed
        if same and with_values(b.params, act="a16") == with_values(params, act="a16"):
            return {key: b.nodes.get(key) for key in ("codes", "scale", "minimum")}
    nodes: dict[str, fx.Node] = {}
    shapes = layouts.get(layout).fake_shapes(packed.shape, params.bits, params.group)
    for key in ("codes", "scale", "minimum"):
        if key != "minimum" or "minimum" in packed.tensors:
            shape, dtype = shapes[key]
            nodes[key] = add_input(graph, f"{site.weight.name}_{key}", shape, dtype or packed.tensors["scale"].dtype, device)
    context.bound.append(Bound(site.weight, params, layout, nodes, site.transposed))
    return {key: nodes.get(key) for key in ("codes", "scale", "minimum")}


def _insert(
    graph: fx.Graph, site: _Site, w: dict[str, fx.Node | None], shape: tuple[int, int],
    params: Bipolar, zero: float, dtype: torch.dtype, act: str, kernel: str,
) -> fx.Node:  # fmt: skip
    node, x, bias, (n, k) = site.node, site.x, site.bias, shape
    three = (w["codes"], w["scale"], w["minimum"])
    if site.kind == "embedding":
        return call(graph, torch.ops.effllm.bipolar_embedding.default, (x, *three, n, k, params.bits, params.group, zero, dtype, kernel), node)
    tail = (n, params.bits, params.group, zero)
    if act == "a8":
        pair = call(graph, torch.ops.effllm.quantize_activation.default, (x,), node)
        xq, xs = (graph.call_function(operator.getitem, (pair, i)) for i in (0, 1))
        for i, part in enumerate((xq, xs)):
            compat.set_example_value(part, compat.example_value(pair)[i])
        return call(graph, torch.ops.effllm.bipolar_linear_a8.default, (xq, xs, *three, bias, *tail, dtype, kernel), node)
    return call(graph, torch.ops.effllm.bipolar_linear.default, (x, *three, bias, *tail, kernel), node)
