"""Compiles a graph around its step program: what lies before the call, the call itself, what lies behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from effllm import compat
from effllm.passes.step_nodes import views
from effllm.passes.step_program import is_program

Compile = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


def in_parts(gm: fx.GraphModule, compile: Compile) -> Callable[..., Any]:
    """A callable with the graph's inputs and outputs; `compile` takes a graph and the fake values of its inputs."""
    nodes = list(gm.graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    at = next((i for i, n in enumerate(nodes) if is_program(n)), None)
    if at is None:
        return compile(gm, [compat.example_value(n) for n in inputs])
    call, output = nodes[at], nodes[-1]
    before = [n for n in nodes[:at] if n.op not in ("placeholder", "get_attr")]
    items = [n for n in nodes[at + 1 : -1] if n.op == "call_function" and n.args and n.args[0] is call]  # in the order of the program's outputs
    behind = [n for n in nodes[at + 1 : -1] if n.op != "get_attr" and n not in items]
    later = {call, *behind, output}
    made = [n for n in before if any(u in later for u in n.users)]
    front = _part(gm, before, inputs, made)
    known = [*inputs, *made, *items]
    back = _part(gm, behind, known, output.args[0])
    position = {n: i for i, n in enumerate([*inputs, *made])}
    needed = tuple(position[n] for n in call.args)  # type: ignore[index]
    program = gm.get_submodule(str(call.target))
    first = _ready(front, inputs, before, compile)
    last = _ready(back, known, behind, compile)
    step = program.forward

    def run(*args: Any) -> Any:
        have = [*args, *first(*args)]
        return last(*have, *step(*[have[i] for i in needed]))

    return run


def _part(gm: fx.GraphModule, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Any) -> fx.GraphModule:
    """The nodes as a graph of their own."""
    graph = fx.Graph()
    moved: dict[fx.Node, fx.Node] = {}
    for n in inputs:
        moved[n] = graph.placeholder(n.name)
        moved[n].meta = n.meta
    for n in nodes:
        for i in n.all_input_nodes:
            if i.op == "get_attr" and i not in moved:
                moved[i] = graph.node_copy(i)
        moved[n] = graph.node_copy(n, lambda x: moved[x])
    graph.output(fx.node.map_arg(tuple(outputs), lambda x: moved[x]))
    return fx.GraphModule(gm, graph)


def _ready(part: fx.GraphModule, inputs: Sequence[fx.Node], nodes: Sequence[fx.Node], compile: Compile) -> Callable[..., Any]:
    """The part as it runs, for the inputs that it reads: as it is where it only takes views or items, else compiled."""
    held = [n for n in part.graph.nodes if n.op == "placeholder"]
    keep = [i for i, n in enumerate(held) if n.users]
    for n in held:
        if not n.users:
            part.graph.erase_node(n)
    part.recompile()
    given = [compat.example_value(inputs[i]) for i in keep]
    run = part.forward if all(views(n) for n in nodes) else compile(part, given)
    return lambda *args: run(*[args[i] for i in keep])
