"""The contract of a graph pass, and what passes share while one graph is rewritten."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from effllm import compat
from effllm.methods import Method
from effllm.recipe import Recipe
from effllm.report import PassReport


@dataclass
class Bound:
    """A packed weight that is looked up at call time: which original input it comes from, and its new placeholders.

    `params` are resolved, because the graph fixes which tensors exist; `transposed` is for
    weights that are held as (in, out).
    """

    source: fx.Node
    params: Method
    layout: str
    nodes: dict[str, fx.Node]
    transposed: bool = False


@dataclass
class Context:
    """One graph on its way through the passes."""

    recipe: Recipe
    strict: bool = False
    kernel: str | None = None
    max_slowdown: float = 1.25
    layers: str = "auto"  # "once", "inline" or "auto", see outline_layers
    step: bool = True  # whether a graph of few tokens may become one call, see step_program
    store: Any = None  # runtime.binding.PackStore
    bound: list[Bound] = field(default_factory=list)
    changed: list[fx.Node] = field(default_factory=list)  # nodes that replaced others, to be verified
    expected: dict[fx.Node, Any] = field(default_factory=dict)  # what the replaced node's value was
    notes: list[str] = field(default_factory=list)


class Pass(Protocol):
    """`requires` names passes that must be in the pipeline; `after` names passes that, if present, run earlier."""

    name: str
    requires: tuple[str, ...]
    after: tuple[str, ...]

    def run(self, graph: fx.Graph, context: Context) -> PassReport:
        """Rewrite in place and report a Decision for every site looked at. Running twice changes nothing the second time."""
        ...


def call(graph: fx.Graph, target: Any, args: tuple[Any, ...], like: fx.Node | None = None) -> fx.Node:
    """Insert a call with its fake value; `like` lends its module stack and source trace."""
    node = graph.call_function(target, args)
    if like is not None:
        node.meta.update({k: v for k, v in like.meta.items() if k in ("nn_module_stack", "stack_trace", "source_fn_stack", "from_node")})
    compat.set_example_value(node, fake_call(graph, target, args))
    return node


def fake_call(graph: fx.Graph, target: Any, args: tuple[Any, ...]) -> Any:
    """The fake result of a call on the fake values of its arguments."""
    mode = compat.fake_mode(graph)
    values = fx.node.map_arg(args, compat.example_value)
    if mode is None:
        return target(*values)
    with mode, torch.no_grad():
        return target(*values)


def replace(context: Context, old: fx.Node, new: fx.Node) -> None:
    """Let `new` take the place of `old`, remembering what has to be equal."""
    context.expected[new] = compat.example_value(old)
    context.changed.append(new)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def add_input(graph: fx.Graph, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> fx.Node:
    """A new static placeholder behind the last one."""
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    mode = compat.fake_mode(graph)
    with graph.inserting_after(placeholders[-1]):
        node = graph.placeholder(name)
    if mode is None:
        value: Tensor = torch.empty(shape, dtype=dtype, device="meta")
    else:
        with mode:
            value = torch.empty(shape, dtype=dtype, device=device)
    compat.set_example_value(node, value)
    compat.mark_static(node)
    return node


def is_op(node: fx.Node, name: str) -> bool:
    """Whether a node calls `torch.ops.effllm.<name>`, as packet or overload."""
    packet = getattr(torch.ops.effllm, name)
    return node.op == "call_function" and node.target in (packet, packet.default)
