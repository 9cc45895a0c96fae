"""Compiles a graph around its step program: what lies before the call, the call itself, what lies behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from effllm import compat
from effllm.passes.step_program import is_program
from effllm.passes.step_views import views
from effllm.runtime.step import StepProgram

Compile = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


def in_parts(gm: fx.GraphModule, compile: Compile) -> Callable[..., Any]:
    """A callable with the graph's inputs and outputs; `compile` takes a graph and the fake values of its inputs."""
    nodes = list(gm.graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    at = next((i for i, n in enumerate(nodes) if is_program(n)), None)
    if at is None:
        return compile(gm, [compat.example_value(n) for n in inputs])
    call, output = nodes[at], nodes[-1]
    before = [n for n in nodes[:at] if n.op not in ("placeholder", "get_attr") and not compat.is_log(n)]
    items = [n for n in nodes[at + 1 : -1] if n.op == "call_function" and n.args and n.args[0] is call]  # in the order of the program's outputs
    behind = [n for n in nodes[at + 1 : -1] if n.op != "get_attr" and n not in items]
    late = _late_numbers(before, behind)
    before, behind = [n for n in before if n not in late], [*late, *behind]
    later = {call, *behind, output}
    made = [n for n in before if any(u in later for u in n.users)]
    front = _part(gm, before, inputs, made)
    known = [*inputs, *made, *items]
    back = _part(gm, behind, known, output.args[0])
    position = {n: i for i, n in enumerate([*inputs, *made])}
    needed = tuple(position[n] for n in call.args)  # type: ignore[index]
    program = gm.get_submodule(str(call.target))
    assert isinstance(program, StepProgram)
    return Parts(_ready(front, inputs, before, compile), program, needed, _ready(back, known, behind, compile), len(inputs))


def _late_numbers(before: list[fx.Node], behind: list[fx.Node]) -> list[fx.Node]:
    """Symbolic numbers (a temperature) that only the back reads, in order: a compiler takes no such number from another part, but the tensor behind it."""
    late: list[fx.Node] = []
    for node in reversed(before):
        if isinstance(compat.example_value(node), torch.SymFloat) and all(u in behind or u in late for u in node.users):
            late.insert(0, node)
    return late


@dataclass(frozen=True)
class Ready:
    """A part as it runs, and which of the values before it, by position, it reads."""

    run: Callable[..., Any]
    keep: tuple[int, ...]
    native: bool = False  # nothing is computed here


@dataclass(frozen=True)
class Straight:
    """A bound program that the changing inputs go right into, and whose values go right to the back."""

    bound: Callable[..., Any]
    order: Sequence[int]  # of the changing inputs
    kept: Sequence[int]  # of the program's values
    back: Ready

    @property
    def native(self) -> bool:
        """Whether nothing but the program runs."""
        return self.back.native

    def __call__(self, *values: Any) -> Any:
        """The graph's outputs for other values."""
        found = self.bound([values[i] for i in self.order])
        return self.back.run(*[found[i] for i in self.kept])


@dataclass(frozen=True)
class Parts:
    """The graph as a callable: front, program, back. Values are numbered: the graph's inputs, what the front makes, what the program makes."""

    front: Ready
    program: StepProgram
    needed: tuple[int, ...]  # by the program
    back: Ready
    inputs: int

    def __call__(self, *args: Any) -> Any:
        """The graph's outputs."""
        have = [*args, *self.front.run(*[args[i] for i in self.front.keep])]
        have += self.program(*[have[i] for i in self.needed])
        return self.back.run(*[have[i] for i in self.back.keep])

    def bind(self, args: Sequence[Any], changing: Sequence[int]) -> Callable[..., Any]:
        """The graph on these inputs for good, but those at `changing`, which come with each call: no other is touched again."""
        made = self.front.run(*[args[i] for i in self.front.keep])
        have, first = [*args, *made], self.inputs + len(made)  # where what the program makes begins
        moves = [i for i, p in enumerate(self.needed) if p in changing or p >= self.inputs]
        bound = self.program.bind([have[i] for i in self.needed], moves)
        moved = [self.needed[i] for i in moves]
        if not made and all(p in changing for p in moved) and all(p >= first for p in self.back.keep):
            order, kept = [changing.index(p) for p in moved], [p - first for p in self.back.keep]
            return Straight(bound, order, kept, self.back)
        few = {p: have[p] for p in {*self.front.keep, *self.back.keep, *moved} if p < self.inputs}  # what is read of the inputs

        def run(*values: Any) -> Any:
            now = few | dict(zip(changing, values, strict=True))
            now.update(enumerate(self.front.run(*[now[i] for i in self.front.keep]), start=self.inputs))
            now.update(enumerate(bound([now[p] for p in moved]), start=first))
            return self.back.run(*[now[i] for i in self.back.keep])

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


def _ready(part: fx.GraphModule, inputs: Sequence[fx.Node], nodes: Sequence[fx.Node], compile: Compile) -> Ready:
    """The part as it runs: as it is where it only takes views or items, else compiled."""
    held = [n for n in part.graph.nodes if n.op == "placeholder"]
    keep = tuple(i for i, n in enumerate(held) if n.users)
    for n in held:
        if not n.users:
            part.graph.erase_node(n)
    part.recompile()
    if not nodes:
        return Ready(_outputs(part), keep, native=True)
    given = [compat.example_value(inputs[i]) for i in keep]
    return Ready(part.forward if all(views(n) for n in nodes) else compile(part, given), keep)


def _outputs(part: fx.GraphModule) -> Callable[..., Any]:
    """A graph that does nothing, without its interpreter."""
    held = [n for n in part.graph.nodes if n.op == "placeholder"]
    output = next(n for n in part.graph.nodes if n.op == "output")
    if not all(isinstance(n, fx.Node) and n in held for n in output.args[0]):
        return part.forward
    order = [held.index(n) for n in output.args[0]]
    return lambda *values: tuple([values[i] for i in order])
