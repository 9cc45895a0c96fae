"""Walk a graph once: every tensor gets its axes, every call the operands that share them."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from effllm import compat
from effllm.coupling.axes import fresh, leaves, pin
from effllm.coupling.capture import Captured
from effllm.coupling.rules import MOVES, RULES, Call, pointwise
from effllm.coupling.rules.base import Axes, pinned_like

Named = tuple[str, Axes]
# what rotary embeddings do with the empty part that is not rotated
_EMPTY = frozenset({"aten.slice", "aten.split", "aten.split_with_sizes", "aten.cat", "aten.narrow", "aten.to", "aten.mul", "aten.add", "aten.transpose"})


@dataclass
class Flow:
    """Axes by node; `tensors` are all that exist at some time, `events` the named tensors that meet in one call, `summed` what products sum over."""

    values: dict[fx.Node, Any] = field(default_factory=dict)
    tensors: list[Named] = field(default_factory=list)
    events: list[tuple[str, list[Named]]] = field(default_factory=list)
    summed: list[tuple[fx.Node, int]] = field(default_factory=list)
    names: dict[fx.Node, str] = field(default_factory=dict)


def trace(captured: Captured) -> Flow:
    """The axes of every tensor of a captured graph."""
    flow = Flow()
    shared: dict[str, Axes] = {}
    for node in captured.graph.nodes:
        if node.op == "placeholder":
            _input(flow, node, captured, shared)
        elif node.op == "call_function":
            _call(flow, node)
        elif node.op == "output":
            for n in node.all_input_nodes:
                _pin_all(flow.values.get(n), "it is an axis of the model's output")
        else:
            flow.values[node] = None
    return flow


def _input(flow: Flow, node: fx.Node, captured: Captured, shared: dict[str, Axes]) -> None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        flow.values[node] = None
        return
    name = captured.owned.get(node)
    if name is None:
        flow.values[node] = pinned_like([int(s) for s in value.shape], f"it is an axis of the model's input {node.name}")
    else:
        reason = "" if value.is_floating_point() or value.is_complex() else f"{name} holds integers, which may number places"
        flow.values[node] = shared.setdefault(name, [fresh(int(s), reason) for s in value.shape])
        flow.names[node] = name
    flow.tensors += _named(flow, node)


def _pin_all(value: Any, reason: str) -> None:
    if value and isinstance(value[0], list):
        for inner in value:
            _pin_all(inner, reason)
    else:
        for axis in value or ():
            pin(axis, reason)


def _call(flow: Flow, node: fx.Node) -> None:
    if node.target is operator.getitem:
        source, index = node.args
        several = flow.values[source]  # type: ignore[index]
        flow.values[node] = several[index] if several else None
        if flow.values[node] is not None:
            flow.tensors += _named(flow, node)
            _meet(flow, f"part of {source}", [source, node])
        return
    sizes = _sizes(node.meta.get("val"))
    call = _described(flow, node)
    if sizes is None:
        flow.values[node] = None
        if "_assert" not in call.op and ".sym_" not in call.op:  # no tensor comes out, but who knows what went on inside
            for value in call.values.values():
                _pin_all(value, f"{call.why} is not understood here")
        return
    result = _apply(call, sizes)
    flow.values[node] = result
    flow.summed += call.summed
    flow.tensors += _named(flow, node)
    flow.tensors += [(f"%{node.name}", axes) for axes in call.reduced]
    _meet(flow, call.why, [*node.all_input_nodes, node])


def _sizes(value: Any) -> list[list[int]] | None:
    if isinstance(value, Tensor):
        return [[int(s) for s in value.shape]]
    if isinstance(value, tuple | list) and value and all(isinstance(v, Tensor) for v in value):
        return [[int(s) for s in v.shape] for v in value]
    return None


def _described(flow: Flow, node: fx.Node) -> Call:
    values = {n: flow.values[n] for n in node.all_input_nodes if flow.values[n] is not None}
    if isinstance(node.target, torch._ops.OpOverload):
        return Call(node, str(node.target.overloadpacket), compat.bind_arguments(node.target, node.args, node.kwargs), values)
    return Call(node, str(getattr(node.target, "__name__", node.target)), {}, values)


def _apply(call: Call, sizes: list[list[int]]) -> Any:
    """A rule's result; where there is none, or it does not give the sizes that were seen, everything keeps its order."""
    several = isinstance(call.node.meta["val"], tuple | list)
    target = call.node.target
    nested = any(v and isinstance(v[0], list) for v in call.values.values())
    empty = any(a.size == 0 for v in call.values.values() if not nested for a in v) or any(0 in s for s in sizes)
    result: Any = None
    plain = not nested and (not empty or call.op in _EMPTY) and len(call.values) == len(call.node.all_input_nodes)
    if isinstance(target, torch._ops.OpOverload) and plain:
        if call.op in RULES:
            result = RULES[call.op](call)
        elif pointwise.is_pointwise(target, call.op):
            result = pointwise.pointwise(call)
    if result is not None and call.op not in MOVES and not nested:
        for axes in call.values.values():
            for leaf in (leaf for axis in axes for leaf in leaves(axis)):
                leaf.used = True
    if result is not None:
        given = [[a.size for a in axes] for axes in (result if several else [result])]
        if given == sizes and isinstance(result, list):
            return result
        call.reduced.clear()
    reason = f"{call.why} is not understood here"
    for value in call.values.values():
        _pin_all(value, reason)
    call.summed.clear()
    unknown = [pinned_like(s, f"result of {call.why}") for s in sizes]
    return unknown if several else unknown[0]


def _meet(flow: Flow, why: str, nodes: list[Any]) -> None:
    """Remember who meets in a call."""
    flow.events.append((why, [pair for n in nodes for pair in _named(flow, n)]))


def _named(flow: Flow, node: fx.Node) -> list[Named]:
    """A node's tensors with a name for each; a percent sign tells activations from parameters."""
    value, name = flow.values.get(node), flow.names.get(node, f"%{node.name}")
    if value and isinstance(value[0], list):
        return [(f"{name}[{i}]", axes) for i, axes in enumerate(value)]
    return [(name, value)] if value else []


def source_of(node: fx.Node, axis: int) -> tuple[fx.Node, int] | None:
    """The placeholder behind a transposed or cast weight and its axis; None where more was done to it."""
    while node.op == "call_function":
        op = str(getattr(node.target, "overloadpacket", ""))
        rank = len(node.meta["val"].shape)
        if op == "aten.permute":
            axis = int(node.args[1][axis]) % rank  # type: ignore[index,arg-type]
        elif op == "aten.t" and rank == 2:
            axis = 1 - axis
        elif op == "aten.transpose":
            a, b = int(node.args[1]) % rank, int(node.args[2]) % rank  # type: ignore[arg-type]
            axis = b if axis == a else a if axis == b else axis
        elif op not in ("aten.to", "aten._to_copy", "aten.alias", "aten.contiguous", "aten.detach", "aten.clone"):
            return None
        node = node.args[0]  # type: ignore[assignment]
    return (node, axis) if node.op == "placeholder" else None
