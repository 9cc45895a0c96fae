"""Isomorphic layers are compiled once: each repeated block of the graph becomes a call of one shared subgraph.

A decoder of thirty layers is thirty times the same graph on other weights. Inductor would schedule, generate and compile all of
them; as calls of one subgraph (torch's invoke_subgraph) it does so once, and the wrapper calls the result thirty times. What is
lost is fusion across the border of two layers.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from effllm import compat
from effllm.passes.base import Context
from effllm.report import Decision, PassReport

_LEAST = 3  # repeats that make a subgraph worth its calls


@dataclass
class Region:
    """The nodes of one layer in graph order, what it reads from outside, and which of its nodes are read outside."""

    name: str
    nodes: list[fx.Node]
    inputs: list[fx.Node]
    outputs: list[fx.Node]
    shape: str = ""  # equal for isomorphic regions


class OutlineLayers:
    """Finds the elements of module lists in the graph and outlines those that repeat."""

    name = "outline_layers"
    requires: tuple[str, ...] = ()
    after: tuple[str, ...] = ("packed_linear", "share_activation", "merge_linear", "merge_lowrank", "sparse_gate", "attention",
                              "fuse_norm", "fuse_glu", "fuse_rope", "step_program")  # fmt: skip

    def run(self, graph: fx.Graph, context: Context) -> PassReport:
        """One Decision per module list: how many of its layers share a subgraph, or why they do not."""
        report = PassReport(self.name)
        lists = _lists(graph)
        obstacle = _obstacle(graph, context.layers) if lists else ""
        for prefix, members in lists.items():
            if obstacle:
                report.decisions.append(Decision(prefix, prefix, "kept", "inline", obstacle))
            else:
                report.decisions.append(self._outline(graph, prefix, members))
        return report

    def _outline(self, graph: fx.Graph, prefix: str, members: list[tuple[str, list[fx.Node]]]) -> Decision:
        position = {n: i for i, n in enumerate(graph.nodes)}
        regions: list[Region] = []
        reasons: list[str] = []
        for name, nodes in members:
            region = _region(graph, name, nodes, position)
            regions.append(region) if isinstance(region, Region) else reasons.append(f"{name}: {region}")
        alike: dict[str, list[Region]] = {}
        for region in regions:
            alike.setdefault(region.shape, []).append(region)
        chosen = [group for group in alike.values() if len(group) >= _LEAST]
        if not chosen:
            reason = reasons[0] if reasons else f"{len(members)} layers of {len(alike)} kinds; {_LEAST} of a kind are needed"
            return Decision(prefix, prefix, "kept", "not-repeated", reason)
        assert graph.owning_module is not None
        for i, group in enumerate(chosen):  # all bodies first: a call replaces what later layers read
            graph.owning_module.add_submodule(_attribute(prefix, i), _body(graph, group[0]))
        moved: dict[fx.Node, fx.Node] = {}  # outputs of layers that are calls now
        for i, group in enumerate(chosen):
            for region in group:
                _call(graph, region, _attribute(prefix, i), moved)
        count = sum(len(g) for g in chosen)
        return Decision(prefix, prefix, "applied", "outlined", f"{count} of {len(members)} layers compiled as {len(chosen)}")


def _obstacle(graph: fx.Graph, layers: str) -> str:
    """Why layers stay in line, or an empty string."""
    if layers == "inline":
        return "asked for"
    if not compat.can_outline():
        return f"torch {torch.__version__} cannot compile a subgraph that writes to its inputs"
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    if torch.is_grad_enabled() and any(_wants_grad(n) for n in inputs):
        return "gradients are recorded"
    devices = {v.device.type for n in inputs if isinstance(v := compat.example_value(n), Tensor)}
    if layers == "auto" and devices - {"cpu", "meta"}:
        return f"not measured on {', '.join(sorted(devices - {'cpu', 'meta'}))}; ask for it with layers=\"once\""
    return ""


def _wants_grad(node: fx.Node) -> bool:
    value = compat.example_value(node)
    return isinstance(value, Tensor) and value.requires_grad


def _lists(graph: fx.Graph) -> dict[str, list[tuple[str, list[fx.Node]]]]:
    """Per outermost module list its elements in graph order, each with its nodes."""
    found: dict[str, dict[str, list[fx.Node]]] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        for path in compat.module_paths(node):
            match = re.fullmatch(r"(.*?)\.?(\d+)", path)
            if match:
                found.setdefault(match[1], {}).setdefault(path, []).append(node)
                break
    return {prefix: list(elements.items()) for prefix, elements in found.items() if len(elements) >= _LEAST}


def _region(graph: fx.Graph, name: str, own: list[fx.Node], position: dict[fx.Node, int]) -> Region | str:
    """The layer as one run of nodes, or why it cannot be."""
    first, last = position[own[0]], position[own[-1]]
    nodes = [n for n in _between(graph, first, last, position) if n.op not in ("get_attr", "placeholder")]
    inside, mine = set(nodes), set(own)
    for n in nodes:
        if n not in mine and any(re.search(r"(^|\.)\d+$", p) for p in compat.module_paths(n)):
            return "nodes of another layer lie between its own"
        if n.op not in ("call_function", "call_method"):
            return f"it holds a {n.op} node"
        if compat.is_custom_mutation(n.target):
            return f"{n.target} writes in place, which torch does not functionalize inside a subgraph for ops that are not its own"
    inputs = list(dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in inside))
    outputs = [n for n in nodes if any(u not in inside for u in n.users)]
    for n in outputs:
        if not isinstance(compat.example_value(n), Tensor):
            return f"{n.name}, which is no tensor, is used outside"
        if any(_shares(n, i) for i in inputs):
            return f"{n.name}, a view of an input, is used outside"
    region = Region(name, nodes, inputs, outputs)
    region.shape = _canonical(region)
    return region


def _between(graph: fx.Graph, first: int, last: int, position: dict[fx.Node, int]) -> Iterator[fx.Node]:
    return (n for n in graph.nodes if first <= position[n] <= last)


def _shares(a: fx.Node, b: fx.Node) -> bool:
    x, y = compat.example_value(a), compat.example_value(b)
    return isinstance(x, Tensor) and isinstance(y, Tensor) and compat.same_storage(x, y)


def _canonical(region: Region) -> str:
    """A text that is equal for regions that do the same on inputs of the same kind."""
    names = {n: f"i{i}" for i, n in enumerate(region.inputs)} | {n: f"n{i}" for i, n in enumerate(region.nodes)}
    lines = [_kind(n) for n in region.inputs]
    for n in region.nodes:
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), lambda a: names[a])
        lines.append(f"{n.target} {args} {sorted(kwargs.items())}")
    return "\n".join([*lines, str([names[n] for n in region.outputs])])


def _kind(node: fx.Node) -> str:
    value = compat.example_value(node)
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.stride()} {value.device}"
    return f"{type(value).__name__} {value}"


def _body(graph: fx.Graph, region: Region) -> fx.GraphModule:
    body = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(region.inputs):
        mapping[node] = body.placeholder(f"arg{i}")
        compat.set_example_value(mapping[node], compat.example_value(node))
    for node in region.nodes:
        mapping[node] = body.node_copy(node, lambda n: mapping[n])
    body.output(tuple(mapping[n] for n in region.outputs))
    assert graph.owning_module is not None
    return fx.GraphModule(graph.owning_module, body)


def _attribute(prefix: str, i: int) -> str:
    return f"repeated_{re.sub(r'[^0-9A-Za-z]', '_', prefix)}_{i}"


def _call(graph: fx.Graph, region: Region, attribute: str, moved: dict[fx.Node, fx.Node]) -> None:
    operands = [moved.get(n, n) for n in region.inputs]
    with graph.inserting_after(region.nodes[-1]):
        body = graph.get_attr(attribute)
    with graph.inserting_after(body):
        called = graph.call_function(torch.ops.higher_order.invoke_subgraph, (body, attribute, *operands))
    compat.set_example_value(called, tuple(compat.example_value(n) for n in region.outputs))
    after = called
    for i, old in enumerate(region.outputs):
        with graph.inserting_after(after):
            after = graph.call_function(operator.getitem, (called, i))
        compat.set_example_value(after, compat.example_value(old))
        after.meta.update({k: v for k, v in old.meta.items() if k in ("nn_module_stack", "stack_trace")})
        old.replace_all_uses_with(after)
        moved[old] = after
    for node in reversed(region.nodes):
        graph.erase_node(node)

