"""A decoding step in one call: the layers of a graph of few tokens become one program for a native kernel.

What the program cannot hold goes before it or behind it, to Inductor: masks of an unusual kind, sampling. Linears and attention are
what a program is made of; where something that it cannot hold lies between those, the graph stays as it is, and the Decision names it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from effllm import compat
from effllm.lowering import step_code
from effllm.lowering.op import rows_of
from effllm.passes.base import Context
from effllm.passes.match import changed, erase_unused, writes
from effllm.passes.step_nodes import Emitter
from effllm.passes.step_views import Unsupported, views
from effllm.report import Decision, PassReport
from effllm.runtime.step import StepProgram

MAX_ROWS = 16  # beyond, products are worth a kernel call each
_LEAST = 4  # linears of a program
_MOST = 0.9  # share of the graph's linears and attentions that one program must hold


class StepPrograms:
    """One Decision for the graph."""

    name = "step_program"
    requires: tuple[str, ...] = ()
    after: tuple[str, ...] = ("packed_linear", "share_activation", "merge_linear", "merge_lowrank", "sparse_gate", "query_rotation",
                              "compressed_attention", "attention", "fuse_norm", "fuse_glu", "fuse_rope")  # fmt: skip

    def run(self, graph: fx.Graph, context: Context) -> PassReport:
        """Replace the program's nodes by one call."""
        report = PassReport(self.name)
        heavy = [n for n in graph.nodes if anchor(n)]
        if len(heavy) < _LEAST:
            return report

        def kept(code: str, reason: str) -> PassReport:
            report.decisions.append(Decision("graph", "", "kept", code, reason))
            return report

        why = _obstacle(graph, heavy, context)
        if why:
            return kept("not-a-step", why)
        erase_unused([n for n in graph.nodes if views(n) or Emitter.holds(n)])  # what other passes left behind
        plan = _plan(graph, heavy)
        if isinstance(plan, str):
            return kept("split", plan)
        why = _order(graph, plan)
        if why:
            return kept("order", why)
        emitter = Emitter(graph)
        try:
            for node in plan.inside:
                emitter.emit(node)
        except Unsupported as error:
            return kept("unsupported", f"{error.node.name}: {error.reason}")
        code, call = _insert(graph, plan, emitter)
        around = [n.name for n in graph.nodes if n.op in ("call_function", "call_method") and not views(n) and n.target is not _item and not compat.is_log(n)]
        found = {"around": around, "instructions": len(code.steps), "levels": code.steps[-1].level + 1, "workspace_bytes": code.workspace}
        what = f"{len(heavy)} linears and attentions in one call"
        report.decisions.append(Decision(call.name, "", "applied", "one-call", what, kernel=emitter.kernel, config=found))
        return report


def anchor(node: fx.Node) -> bool:
    """Linears and attentions of any kind: what takes the time of a step."""
    if node.op != "call_function":
        return False
    if node.target in compat.LINEAR or node.target in compat.ADDMM or node.target in compat.ATTENTION:
        return True
    text = str(node.target)
    return text.startswith("effllm.") and ("linear" in text or "attention" in text or "attend" in text)


@dataclass
class Plan:
    """The program's nodes and what runs behind it, in graph order; all others run before."""

    inside: list[fx.Node] = field(default_factory=list)
    behind: list[fx.Node] = field(default_factory=list)


def _obstacle(graph: fx.Graph, heavy: list[fx.Node], context: Context) -> str:
    """Why the graph is no step of few tokens on the CPU; empty if it is."""
    if not context.step:
        return "asked for"
    values = [compat.example_value(n) for n in graph.nodes if n.op == "placeholder"]
    if any(not isinstance(s, int) for v in values if isinstance(v, Tensor) for s in v.shape) or any(isinstance(v, torch.SymInt) for v in values):
        return "its shapes are dynamic"
    if any(v.device.type != "cpu" for v in values if isinstance(v, Tensor)):
        return "only the CPU has a kernel of step programs"
    if torch.is_grad_enabled() and any(v.requires_grad for v in values if isinstance(v, Tensor)):
        return "gradients are recorded"
    results = [compat.example_value(n) for n in heavy if "linear" in str(n.target)]
    most = max((rows_of(r) or MAX_ROWS + 1 for r in results if isinstance(r, Tensor)), default=0)
    return f"{most} rows: products are worth a call each" if most > MAX_ROWS else ""


def _plan(graph: fx.Graph, heavy: list[fx.Node]) -> Plan | str:
    """Nodes by where they run, or why there is no place for one program."""
    anchors = set(heavy)
    deep: set[fx.Node] = set()  # depends on an anchor
    level: dict[fx.Node, int] = {}  # how often a value left the program on its way
    blocker: dict[int, fx.Node] = {}
    for n in graph.nodes:
        if n.op in ("placeholder", "get_attr", "output"):
            level[n] = 0
            continue
        level[n] = max((level[i] for i in n.all_input_nodes), default=0)
        if any(i in deep for i in n.all_input_nodes) or n in anchors:
            deep.add(n)
        if not views(n) and not Emitter.holds(n):
            if n in anchors:
                return f"{n.target} has no instruction ({compat.module_of(n)[0] or n.name})"
            if n in deep:
                level[n] += 1
                blocker.setdefault(level[n], n)
    count: dict[int, int] = {}
    for n in heavy:
        count[level[n]] = count.get(level[n], 0) + 1
    best = max(count, key=lambda i: count[i])
    if count[best] < _MOST * len(heavy):
        n = blocker[min(blocker)]
        return f"{compat.module_of(n)[0] or 'the graph'}: {n.name} ({n.target}) lies between layers and has no instruction"
    inside = {n for n in deep if level[n] == best and (Emitter.holds(n) or n in anchors)}
    for n in reversed(graph.nodes):  # what only the program reads comes in, and in-place changes without readers
        if n in inside or n in deep or not Emitter.holds(n):
            continue
        users = _readers(n)
        if users <= inside and (users or writes(n)):
            inside.add(n)
    plan = Plan()
    for n in graph.nodes:
        if n in inside:
            plan.inside.append(n)
        elif n in deep and not views(n) and level[n] >= best:
            plan.behind.append(n)
    return plan


def _readers(node: fx.Node) -> set[fx.Node]:
    """Users of a node's value, through views."""
    found: set[fx.Node] = set()
    for user in node.users:
        found |= _readers(user) if views(user) else {user}
    return found


def _root(node: fx.Node) -> fx.Node:
    while views(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _order(graph: fx.Graph, plan: Plan) -> str:
    """Whether in-place changes keep their place among what reads the same memory; a reason where not."""
    inside, behind = set(plan.inside), set(plan.behind)
    touched: dict[fx.Node, list[fx.Node]] = {}
    writers: dict[fx.Node, list[fx.Node]] = {}
    for n in graph.nodes:
        if n.op in ("placeholder", "get_attr", "output") or views(n):
            continue
        for i in n.all_input_nodes:
            touched.setdefault(_root(i), []).append(n)
        for i in changed(n):
            writers.setdefault(_root(i), []).append(n)
    rank = {n: i for i, n in enumerate(graph.nodes)}
    for base, nodes in writers.items():
        here = [n for n in touched[base] if n in inside]
        if not here:
            continue
        first, last = min(rank[n] for n in nodes), max(rank[n] for n in nodes)
        for n in touched[base]:
            if n in inside or (n in behind and rank[n] > last) or (n not in behind and n not in nodes and rank[n] < first):
                continue
            return f"{n.name} reads or changes {base.name} in the middle of what the program does with it"
        if any(n not in inside for n in nodes):
            return f"{base.name} is changed in and out of the program"
    return ""


def _insert(graph: fx.Graph, plan: Plan, emitter: Emitter) -> tuple[step_code.Code, fx.Node]:
    """The call in place of the program's nodes, behind everything that does not depend on it."""
    inside, behind = set(plan.inside), set(plan.behind)
    wanted = []  # values that are read outside
    for n in plan.inside:
        if any(u not in inside for u in _readers(n)) and not writes(n):
            wanted.append(n)
    code = emitter.finish(wanted)
    owner: Any = graph.owning_module
    label = "step_program"
    # what comes straight from a caller that is no parameter, buffer or cache may be another tensor each time, too
    fresh = [i for i, n in enumerate(emitter.inputs) if n.op != "placeholder"]
    owner.add_submodule(label, StepProgram(code, emitter.namespace, fresh))
    output = next(n for n in graph.nodes if n.op == "output")
    later = [n for n in graph.nodes if n in behind or (views(n) and _root(n) in inside | behind)]
    with graph.inserting_before(output):
        call = graph.call_module(label, tuple(emitter.inputs))
    compat.set_example_value(call, tuple(compat.example_value(n) for n in wanted))
    moved: dict[fx.Node, fx.Node] = {}
    for i, n in enumerate(wanted):
        with graph.inserting_before(output):
            moved[n] = graph.call_function(_item, (call, i))
        compat.set_example_value(moved[n], compat.example_value(n))
    for n in later:  # views of the program's values are taken again where they are read behind it
        if views(n) and not any(u not in inside for u in _readers(n)):
            continue
        with graph.inserting_before(output):
            moved[n] = graph.node_copy(n, lambda x: moved.get(x, x))
    output.args = fx.node.map_arg(output.args, lambda x: moved.get(x, x))
    for n in reversed(list(graph.nodes)):
        if (n in inside or n in behind or n in later) and not n.users:
            graph.erase_node(n)
    erase_unused([n for n in graph.nodes if views(n)])
    return code, call


def _item(values: tuple[Tensor, ...], i: int) -> Tensor:
    return values[i]


def is_program(node: fx.Node) -> bool:
    """Whether a node is the call of a program."""
    return node.op == "call_module" and str(node.target).startswith("step_program")


