"""Replaces dense linears and embeddings by ops on packed inputs, as the recipe says.

A linear is a linear node, or addmm of a vector and a parameter that is held as (in, out): what Conv1D of GPT-2 comes to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from effllm import compat
from effllm.autotune import dense, use
from effllm.errors import EffllmError
from effllm.lowering import providers
from effllm.lowering.bipolar_linear import stamped
from effllm.lowering.op import Problem, Provider, rows_of
from effllm.methods import Method
from effllm.passes.base import Bound, Context, add_input, replace
from effllm.passes.insert import insert
from effllm.passes.sites import Site, others, read
from effllm.recipe import Rule
from effllm.report import Decision, PassReport
from effllm.runtime.formats.base import Packed
from effllm.runtime.weights import kind_of


class PackLinear:
    """One Decision per linear or embedding with a parameter for a weight, and per parameter that other ops read."""

    name = "packed_linear"
    requires: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    def run(self, graph: fx.Graph, context: Context) -> PassReport:
        """Rewrite every site that a rule covers."""
        report = PassReport(self.name)
        grad = _needs_grad(graph)
        for node in list(graph.nodes):
            site = read(node)
            if site is not None:
                report.decisions.append(_site(graph, site, grad, context))
        report.decisions += others(graph)
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


def _site(graph: fx.Graph, site: Site, grad: bool, context: Context) -> Decision:
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
    if rule.params.requires_calibration:
        reason = f"{rule.params.method} needs calibration data, which a backend does not have; use effllm.compress(model, recipe, calibration)"
        return kept("calibration", reason)
    try:
        return _apply(graph, site, real, module, rule, context)
    except EffllmError as error:
        return Decision(node.name, module, "failed", error.code, error.cause)


def _plain_embedding(node: fx.Node) -> bool:
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return not (given.get("max_norm") or given.get("scale_grad_by_freq") or given.get("sparse"))


def _apply(graph: fx.Graph, site: Site, real: Tensor, module: str, rule: Rule, context: Context) -> Decision:
    node, kind, asked = site.node, site.kind, rule.params
    value = compat.example_value(site.x)
    dtype = value.dtype if kind == "linear" else real.dtype
    act = asked.act if kind == "linear" else "a16"
    packed: Packed = context.store.describe(real, asked, transposed=site.transposed)
    params, form = asked.resolved(packed.attrs), kind_of(packed.format)
    problem = form.problem(packed, act=act, dtype=dtype, device=real.device.type, m=rows_of(value) if kind == "linear" else 1)
    provider, why = providers.select(problem, context.kernel)
    size = {"bytes_before": real.numel() * real.element_size(), "bytes_after": packed.nbytes}
    config = {**form.describe(packed), "act": act}
    before, after = _predict(problem, provider) if kind == "linear" else (None, None)
    if kind == "linear" and provider.tuning is not None:
        choice = use.choose(provider, problem)
        config["tuned"] = choice.source
        why = "; ".join(filter(None, (why, choice.reason)))
    if before is not None and after is not None and after > before * context.max_slowdown:
        reason = f"predicted {after / before:.2f}x the time of the dense linear at {problem.m} rows"
        return Decision(node.name, module, "kept", "slower", reason, **size, time_before=before, time_after=after, kernel=provider.name, config=config)
    tensors = _bind(graph, site, real, params, provider.layout, context)
    with graph.inserting_before(node):
        new = insert(graph, site, packed, tensors, dtype, act, stamped(provider))
    replace(context, node, new)
    return Decision(node.name, module, "applied", "applied", why, **size, time_before=before, time_after=after, kernel=provider.name, config=config)


def _predict(problem: Problem, provider: Provider) -> tuple[float | None, float | None]:
    if provider.tuning is None:
        return None, None
    return dense.seconds(problem), provider.tuning.predict(problem, provider.tuning.first(problem)).seconds


def _bind(graph: fx.Graph, site: Site, real: Tensor, params: Method, layout: str, context: Context) -> dict[str, fx.Node]:
    """Placeholders for the packed tensors; a weight used twice in the same way is bound once."""
    for b in context.bound:
        same = b.source is site.weight and b.layout == layout and b.transposed == site.transposed
        if same and b.params.stored_as() == params.stored_as():
            return b.nodes
    nodes = {}
    for key, t in context.store.tensors(real, params, layout, transposed=site.transposed).items():
        nodes[key] = add_input(graph, f"{site.weight.name}_{key}", tuple(t.shape), t.dtype, t.device)
    context.bound.append(Bound(site.weight, params, layout, nodes, site.transposed))
    return nodes
