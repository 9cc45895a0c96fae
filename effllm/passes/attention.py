"""Scaled dot product attention goes to kernels that read grouped keys without repeating them: one for a few queries (decoding), one for prompts."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from effllm import compat
from effllm.lowering import providers
from effllm.lowering.op import Problem
from effllm.passes.base import Context, call, replace
from effllm.report import Decision, PassReport

MAX_QUERIES = 4  # beyond a few queries tiles of keys are worth transposing
NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


class Attention:
    """One Decision per attention node."""

    name = "attention"
    requires: tuple[str, ...] = ()
    after: tuple[str, ...] = ("query_rotation", "compressed_attention")

    def run(self, graph: fx.Graph, context: Context) -> PassReport:
        """Replace where a kernel exists for the device and the number of queries."""
        report = PassReport(self.name)
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target in compat.ATTENTION:
                report.decisions.append(_site(graph, node, context))
        return report


def _site(graph: fx.Graph, node: fx.Node, context: Context) -> Decision:
    module, _ = compat.module_of(node)
    given: dict[str, Any] = dict(zip(NAMES, node.args, strict=False)) | dict(node.kwargs)

    def kept(code: str, reason: str) -> Decision:
        return Decision(node.name, module, "kept", code, reason)

    q, k, v = (given[n] for n in NAMES[:3])
    query = compat.example_value(q)
    if torch.is_grad_enabled() and any(compat.example_value(t).requires_grad for t in (q, k, v)):
        return kept("grad", "gradients are recorded and the op is for inference only")
    mask, causal = given.get("attn_mask"), given.get("is_causal") or False
    if given.get("dropout_p") or not isinstance(causal, bool) or (causal and mask is not None):
        return kept("options", "dropout is set, or is_causal beside a mask or computed in the graph")
    if isinstance(given.get("scale"), fx.Node):
        return kept("scale", "the scale is computed in the graph, where shapes are dynamic")
    if query.dim() != 4:
        return kept("shapes", f"queries have {query.dim()} dimensions, not 4")
    if mask is not None and compat.example_value(mask).dim() != 4:
        return kept("mask", "the mask is not 4-dimensional")
    k, v = grouped(k), grouped(v)
    keys, values = compat.example_value(k), compat.example_value(v)
    if keys.shape[:-1] != values.shape[:-1]:
        return kept("shapes", "keys and values differ in shape")
    queries = query.shape[2]
    few = isinstance(queries, int) and queries <= MAX_QUERIES and not causal and keys.shape == values.shape
    op = "decode_attention" if few else "prompt_attention"
    problem = Problem(op, query.shape[1], query.shape[3], 0, 0, False, m=queries if isinstance(queries, int) else None, dtype=query.dtype, device=query.device.type)
    provider, why = providers.select(problem)
    if provider.name == "reference":
        return kept("no-kernel", why)
    scale = given.get("scale")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    with graph.inserting_before(node):
        if few:
            new = call(graph, torch.ops.effllm.decode_attention.default, (q, k, v, mask, scale, provider.name), node)
            made = new
        else:
            new = call(graph, torch.ops.effllm.prompt_attention.default, (q, k, v, mask, causal, scale, provider.name), node)
            made = call(graph, torch.transpose, (new, 1, 2), node)
    context.changed.append(new)
    expected = compat.example_value(node)
    if tuple(compat.example_value(made).stride()) == tuple(expected.stride()):
        replace(context, node, made)
    else:  # torch's kernel may leave heads innermost; consumers reshape, which takes either
        node.replace_all_uses_with(made)
        graph.erase_node(node)
    groups = query.shape[1] // keys.shape[1]
    return Decision(new.name, module, "applied", "applied", why, kernel=provider.name, config={"queries": str(queries), "heads_per_key_head": groups})


def grouped(node: fx.Node) -> fx.Node:
    """The grouped keys behind the usual repetition x[:, :, None].expand(...).reshape(...); the node itself if it is not that."""
    reshape = node
    if not (reshape.op == "call_method" and reshape.target == "reshape"):
        return node
    expand = reshape.args[0]
    if not (isinstance(expand, fx.Node) and expand.op == "call_method" and expand.target == "expand"):
        return node
    getitem = expand.args[0]
    every = slice(None, None, None)
    if not (isinstance(getitem, fx.Node) and getitem.target is operator.getitem and getitem.args[1] == (every, every, None, every, every)):
        return node
    base = getitem.args[0]
    if not isinstance(base, fx.Node):
        return node
    x, wide, flat = (compat.example_value(n) for n in (base, expand, reshape))
    if not all(isinstance(t, Tensor) for t in (x, wide, flat)) or x.dim() != 4 or wide.dim() != 5 or flat.dim() != 4:
        return node
    b, h, s, d = x.shape
    fits = tuple(wide.shape) == (b, h, wide.shape[2], s, d) and tuple(flat.shape) == (b, h * wide.shape[2], s, d)
    return base if fits else node
