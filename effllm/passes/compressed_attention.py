"""Append, read, (repeat) and attention over a compressed cache become append and one fused op that makes no dense keys and values.

Looks at every `effllm::kv_read`. Where its keys and values go to one scaled dot product attention of a few queries and nowhere else, the
attention is replaced by `effllm::kv_attend` on the packed state, and the read goes away; where an edit session turns the keys on their way,
by `effllm::kv_attend_turned`. Appends get the best kernel by name.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from effllm import compat
from effllm.autotune import kv_cost
from effllm.lowering import kv_cache, providers
from effllm.passes.base import Context, call, is_op, replace
from effllm.passes.attention import MAX_QUERIES, NAMES, grouped
from effllm.report import Decision, PassReport
from effllm.runtime.caches.base import parse


class CompressedAttention:
    """One Decision per read and one per append."""

    name = "compressed_attention"
    requires: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    def run(self, graph: fx.Graph, context: Context) -> PassReport:
        """Rewrite in place."""
        report = PassReport(self.name)
        for node in list(graph.nodes):
            if is_op(node, "kv_append") and node.args[8] == "auto":
                report.decisions.append(_append(node))
        for node in list(graph.nodes):
            if is_op(node, "kv_read"):
                report.decisions.append(_read(graph, node, context))
        return report


def _append(node: fx.Node) -> Decision:
    """Name the kernel."""
    module, _ = compat.module_of(node)
    ring, k, spec = compat.example_value(node.args[1]), compat.example_value(node.args[4]), str(node.args[7])
    rows = k.shape[2] if isinstance(k.shape[2], int) else None
    provider, why = providers.select(kv_cache.problem("kv_append", spec, k.shape[1], ring, rows))
    node.args = (*node.args[:8], provider.name)
    return Decision(node.name, module, "applied", "append", why, kernel=provider.name, config={"cache": spec})


def _read(graph: fx.Graph, read: fx.Node, context: Context) -> Decision:
    module, _ = compat.module_of(read)

    def kept(code: str, reason: str) -> Decision:
        return Decision(read.name, module, "kept", code, f"{reason}; keys and values are decompressed, then attended to")

    found = _attention(read)
    if isinstance(found, str):
        return kept("pattern", found)
    node, given, turn = found
    q = compat.example_value(given["query"])
    if q.dim() != 4 or not isinstance(q.shape[2], int) or q.shape[2] > MAX_QUERIES:
        return kept("many-queries", f"{q.shape[-2]} queries")
    if torch.is_grad_enabled() and q.requires_grad:
        return kept("grad", "gradients are recorded and the op is for inference only")
    if given.get("dropout_p") or given.get("is_causal"):
        return kept("options", "dropout or is_causal is set")
    mask = given.get("attn_mask")
    if mask is not None and compat.example_value(mask).dim() != 4:
        return kept("mask", "the mask is not 4-dimensional")
    pages, ring, lens, tables, spec = read.args
    late = _appends_between(read, node, pages)
    if late:
        return kept("order", f"{late} writes to the cache between the read and the attention")
    state, fmt = compat.example_value(ring), parse(str(spec))
    op = "kv_attend_turned" if turn else "kv_attend"
    provider, why = providers.select(kv_cache.problem(op, str(spec), q.shape[1], state, q.shape[2]))
    if provider.name == "reference":
        return kept("no-kernel", why)
    scale = given.get("scale")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    with graph.inserting_before(node):
        target = getattr(torch.ops.effllm, op).default
        new = call(graph, target, (given["query"], pages, ring, lens, tables, mask, *turn, scale, spec, provider.name), node)
    expected = compat.example_value(node)
    if tuple(compat.example_value(new).stride()) == tuple(expected.stride()):
        replace(context, node, new)
    else:  # as in attention: consumers reshape, which takes either
        context.changed.append(new)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    _sweep(graph, read)
    heads, dim = state.shape[2], state.shape[4]
    before, after = 2 * heads * dim * state.element_size(), fmt.bytes_per_token(heads, dim, state.dtype)
    about: dict[str, Any] = {"cache": fmt.spec, "queries": q.shape[2], "heads_per_key_head": q.shape[1] // heads, "bytes_per_token": round(after, 1)}
    if turn:
        why += "; queries are turned to where keys were packed"
        about["table"] = compat.example_value(turn[1]).shape[0]
    reason = f"{why}; {after / before:.1%} of the bytes of dense keys and values a token"
    held = compat.example_value(pages).shape[1] * fmt.page + state.shape[3]
    cost = None
    if state.device.type == "cpu":
        kind = "mustafar-coded" if fmt.name == "mustafar" and getattr(fmt, "bits", 16) < 16 else fmt.name
        cost = kv_cost.predict(kind, held, state.shape[3], q.shape[1], dim, before, after, q.shape[2])
    elif state.device.type in kv_cost.PREDICTORS:
        site = kv_cost.Site(fmt.spec, held, state.shape[0], heads, q.shape[1], dim, q.shape[2], state.dtype)
        cost = kv_cost.PREDICTORS[state.device.type](site)
    if cost is not None:
        about["crossover_tokens"] = cost.crossover
        reason += f"; predicted to pay from {cost.crossover} tokens of context" if cost.crossover else "; predicted to save memory, but no time"
    _, count, size = compat.example_value(pages).shape
    return Decision(
        new.name, module, "applied", "applied", reason, int(before * held), int(count * size + state.shape[3] * before),
        None if cost is None else cost.dense, None if cost is None else cost.compressed, provider.name, about,
    )  # fmt: skip


def _attention(read: fx.Node) -> tuple[fx.Node, dict[str, Any], tuple[Any, ...]] | str:
    """The one attention that keys and values go to, its arguments by name, and how keys turn on the way (row, cos, sin, layout) if they do;
    or what is there instead."""
    parts = {u.args[1]: u for u in read.users if u.target is operator.getitem}
    if len(parts) != len(read.users) or set(parts) != {0, 1}:
        return "the pair of keys and values is used as a whole"
    ends = []
    for i in (0, 1):
        node = parts[i]
        while len(node.users) == 1:
            user = next(iter(node.users))
            if user.op == "call_function" and user.target in compat.ATTENTION:
                ends.append(user)
                break
            node = user
        else:
            return f"the {('keys', 'values')[i]} have {len(node.users)} users"
    if ends[0] is not ends[1]:
        return "keys and values go to different attentions"
    given: dict[str, Any] = dict(zip(NAMES, ends[0].args, strict=False)) | dict(ends[0].kwargs)
    keys: Any = grouped(given["key"])
    turn: tuple[Any, ...] = ()
    if is_op(keys, "pie_apply") and keys.args[1] is None:  # an edited text: see effllm/hf/edit_packed.py
        keys, turn = keys.args[0], tuple(keys.args[2:6])
    if keys is not parts[0] or grouped(given["value"]) is not parts[1]:
        return "something other than the repetition of key heads lies between the cache and the attention"
    return ends[0], given, turn


def _appends_between(read: fx.Node, node: fx.Node, pages: Any) -> str:
    """The name of an append to the same cache behind the read, or an empty string."""
    current = read.next
    while current is not node:
        if is_op(current, "kv_append") and current.args[0] is pages:
            return current.name
        current = current.next
    return ""


def _sweep(graph: fx.Graph, read: fx.Node) -> None:
    """Erase the read and what only led from it to the attention."""
    def erase(node: fx.Node) -> None:
        for user in list(node.users):
            erase(user)
        if not node.users:
            graph.erase_node(node)

    erase(read)
