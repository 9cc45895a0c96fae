"""The graph of coupled dimensions of a model: which (parameter, axis) pairs must be permuted together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import Any

import networkx as nx
from torch import nn

from effllm.coupling.axes import Atom, Expr, Prod, Sum, resolve
from effllm.coupling.capture import Captured, capture
from effllm.coupling.dimension import Dimension, Loop, Member, Structure
from effllm.coupling.flow import Flow, Named, source_of, trace
from effllm.errors import CouplingError, nearest


@dataclass(frozen=True)
class Slot:
    """Where a dimension sits on an axis of a tensor of the graph: a node of `CoupledGraph.networkx`."""

    tensor: str
    axis: int
    offset: int
    stride: int


@dataclass(frozen=True)
class _Place:
    """An atom on an axis, with the other factors around it."""

    atom: Atom
    offset: int
    stride: int
    loops: tuple[tuple[Expr, int], ...]


def _places(e: Expr) -> Iterator[_Place]:
    e = resolve(e)
    if isinstance(e, Atom):
        yield _Place(e, 0, 1, ())
    elif isinstance(e, Sum):
        offset = 0
        for part in e.parts:
            yield from (_Place(p.atom, p.offset + offset, p.stride, p.loops) for p in _places(part))
            offset += part.size
    else:
        strides = [prod(f.size for f in e.factors[i + 1 :]) for i in range(len(e.factors))]
        for i, f in enumerate(e.factors):
            around = tuple((g, s) for j, (g, s) in enumerate(zip(e.factors, strides, strict=True)) if j != i)
            for p in _places(f):
                inside = tuple((g, s * strides[i]) for g, s in p.loops)
                yield _Place(p.atom, p.offset * strides[i], p.stride * strides[i], around + inside)


def _plain(e: Expr) -> list[Atom]:
    """The atoms that every element of an axis has a place in: factors, not parts."""
    e = resolve(e)
    return [e] if isinstance(e, Atom) else [f for f in e.factors if isinstance(f, Atom)] if isinstance(e, Prod) else []


def _contexts(flow: Flow, parameters: set[str]) -> dict[Atom, list[Atom]]:
    """For every atom the other atoms that are there in every tensor that has it, once: along those its order may differ from place to place.

    In a parameter they have to be on the same axis, so that a permutation of the axis says it all.
    """
    found: dict[Atom, list[Atom]] = {}
    for name, axes in flow.tensors:
        plain = [_plain(e) for e in axes]
        counts = Counter(a for axis in plain for a in axis)
        for i, e in enumerate(axes):
            others = [] if name in parameters else [a for j, axis in enumerate(plain) if j != i for a in axis]
            for p in _places(e):
                near = [a for a in (*(resolve(g) for g, _ in p.loops), *others) if isinstance(a, Atom) and a is not p.atom]
                around = [a for a in near if counts[a] <= 1 and near.count(a) == 1]
                found[p.atom] = [a for a in found.get(p.atom, around) if any(a is b for b in around)]
    return found


@dataclass
class CoupledGraph:
    """Dimensions of a model. `networkx` has Slots as nodes, parameters' and activations', and an edge with attribute `op` where a call couples two of them."""

    dimensions: tuple[Dimension, ...]
    networkx: nx.Graph
    aliases: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @staticmethod
    def of(model: nn.Module, example_inputs: Any, *, output: str | None = None) -> CoupledGraph:
        """The coupled dimensions of `model(*example_inputs)` (`**` for a dict). Raises CouplingError where the model cannot be traced.

        Every axis of the output keeps its order. `output="logits"` takes that field of the output alone, so that hidden states and caches beside it
        may be reordered. Only what this call reaches is known.
        """
        captured = capture(model, example_inputs, output)
        return _build(captured, trace(captured))

    def of_parameter(self, name: str, axis: int) -> tuple[Dimension, ...]:
        """The dimensions on an axis of a parameter or buffer, by any of its names. Raises CouplingError for what the graph does not have."""
        canonical = self.aliases.get(name, name)
        if canonical not in self.parameters:
            raise CouplingError("E-CPL-PARAMETER", f"the captured graph does not use {name!r}", nearest(name, self.parameters))
        rank = len(self.parameters[canonical])
        if not -rank <= axis < rank:
            raise CouplingError("E-CPL-PARAMETER", f"{name} has no axis {axis}", f"its shape is {self.parameters[canonical]}")
        return tuple(d for d in self.dimensions if any(m.parameter == canonical and m.axis == axis % rank for m in d.members))

    def why(self, first: tuple[str, int], second: tuple[str, int]) -> list[str]:
        """The operations along which a dimension flows between two (parameter, axis) pairs; empty where none does."""
        ends = [[s for s in self.networkx if s.tensor == self.aliases.get(n, n) and s.axis == a] for n, a in (first, second)]
        for start in ends[0]:
            for end in ends[1]:
                if nx.has_path(self.networkx, start, end):
                    path = nx.shortest_path(self.networkx, start, end)
                    return [self.networkx.edges[pair]["op"] for pair in pairwise(path)]
        return []

    def explain(self, names: int = 3) -> str:
        """A table with one line per dimension."""
        lines = [f"{'#':>4} {'size':>6} {'structure':34} {'members':>7}  where"]
        for d in self.dimensions:
            where = [f"{m.parameter}[{m.axis}]" for m in d.members]
            text = ", ".join(dict.fromkeys(where[:names])) + (", ..." if len(where) > names else "")
            state = f"pinned: {d.pinned[0]}" if d.pinned else str(d.structure)
            lines.append(f"{d.index:4} {d.size:6} {state[:60]:34} {len(d.members):7}  {text}")
        return "\n".join(lines)


def _build(captured: Captured, flow: Flow) -> CoupledGraph:
    used = {flow.names[n] for n in captured.owned if n.users}
    summed = {(flow.names[s[0]], s[1]) for s in (source_of(n, a) for n, a in flow.summed) if s is not None and s[0] in captured.owned}
    contexts = _contexts(flow, used)
    graph: nx.Graph = nx.Graph()
    owner: dict[Slot, tuple[Atom, _Place, int]] = {}
    cache: dict[int, list[tuple[Slot, Atom]]] = {}
    for op, named in flow.events:
        meeting: dict[Atom, Slot] = {}
        for slot, atom in (pair for n in named for pair in _slots(n, cache, owner)):
            graph.add_node(slot, parameter=slot.tensor in used, size=atom.size)
            first = meeting.setdefault(atom, slot)
            if first != slot:
                graph.add_edge(first, slot, op=op)
    found: list[Dimension] = []
    for component in nx.connected_components(graph):
        slots = sorted((s for s in component if s.tensor in used), key=lambda s: (s.tensor, s.axis, s.offset, s.stride))
        if slots:
            found.append(_dimension(slots, owner, contexts, summed, captured))
    order = {name: i for i, name in enumerate(captured.tensors)}
    found.sort(key=lambda d: (min(order[m.parameter] for m in d.members), d.members[0].axis, d.members[0].offset, -d.structure.unit))
    numbered = tuple(Dimension(i, d.structure, d.members, d.pinned, d.volatile, d.names) for i, d in enumerate(found))
    shapes = {name: tuple(captured.tensors[name].shape) for name in captured.tensors if name in used}
    return CoupledGraph(numbered, graph, {a: n for a, n in captured.aliases.items() if n in used}, shapes)


def _slots(named: Named, cache: dict[int, list[tuple[Slot, Atom]]], owner: dict[Slot, tuple[Atom, _Place, int]]) -> list[tuple[Slot, Atom]]:
    name, axes = named
    if id(axes) not in cache:
        made = [(Slot(name, i, p.offset, p.stride), p, resolve(e).size) for i, e in enumerate(axes) for p in _places(e)]
        owner.update({slot: (p.atom, p, size) for slot, p, size in made})
        cache[id(axes)] = [(slot, p.atom) for slot, p, _ in made]
    return cache[id(axes)]


def _dimension(
    slots: list[Slot], owner: dict[Slot, tuple[Atom, _Place, int]], contexts: dict[Atom, list[Atom]], summed: set[tuple[str, int]], captured: Captured
) -> Dimension:
    atom = owner[slots[0]][0]
    assert all(owner[s][0] is atom for s in slots), "axes that meet in no call cannot be one dimension"
    around = contexts[atom]
    members = []
    for slot in slots:
        place, size = owner[slot][1:]
        loops = tuple(Loop(g.size, s, next((i for i, a in enumerate(around) if resolve(g) is a), None)) for g, s in place.loops)
        members.append(Member(slot.tensor, slot.axis, size, slot.offset, slot.stride, loops, (slot.tensor, slot.axis) in summed))
    occurrences = max(Counter((m.parameter, m.axis) for m in members).values())
    structure = Structure(atom.size, tuple(a.size for a in around), max(m.stride for m in members), occurrences, atom.rotary)
    names = {m.parameter: tuple(sorted(a for a, n in captured.aliases.items() if n == m.parameter)) for m in members}
    volatile = tuple(sorted({m.parameter for m in members} & captured.volatile))
    # what this call leaves out, another may use: the positions beyond the example's length
    pins = tuple(atom.pins) or (() if atom.used else ("this part of the axis is not used by the captured call",))
    return Dimension(0, structure, tuple(members), pins, volatile, names)
