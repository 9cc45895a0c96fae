"""What each linear of a decoder graph is for: query, key, value, output, gate, up, down, found by how data flow and not by names.

    attention   the linears nearest before the query, key and value of scaled_dot_product_attention (or of the products around a softmax),
                and the nearest one after it
    gated MLP   down(act(gate(x)) * up(x)), factors in either order; gate and up may be halves of one linear (chunk, split, slice)

Linears are dense ones with a parameter and those of packed modules, both known by the name of their module.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from effllm import compat
from effllm.passes.base import is_op
from effllm.passes.sites import read
from effllm.runtime.packed import PackedLinear

_ACTIVATIONS = (
    torch.nn.functional.silu, torch.nn.functional.gelu, torch.nn.functional.relu, torch.nn.functional.mish, torch.relu, torch._C._nn.gelu,
    torch.nn.functional.hardswish, torch.sigmoid,
)  # fmt: skip
_PRODUCTS = (operator.mul, torch.mul)
_MATMULS = (torch.matmul, operator.matmul, torch.bmm)


@dataclass(frozen=True)
class Linear:
    """A linear node: what it reads, its module's name, its (N, K)."""

    node: fx.Node
    x: fx.Node
    module: str
    shape: tuple[int, int]


@dataclass(frozen=True)
class Gated:
    """A gated MLP: `act` is the value of the activation function, `product` act * up. Fused: gate and up are one linear, and `half` is
    the part of it (0 or 1) that is the up projection, `up_value` the node of that part."""

    act: fx.Node
    product: fx.Node
    gate: Linear
    up: Linear
    down: Linear
    up_value: fx.Node
    half: int | None = None

    @property
    def fused(self) -> bool:
        """Whether gate and up are one linear."""
        return self.half is not None


@dataclass
class Roles:
    """The linears of a graph with what they are for, in graph order."""

    linears: dict[fx.Node, Linear]
    of: dict[str, str] = field(default_factory=dict)  # module -> role
    gated: list[Gated] = field(default_factory=list)


def roles(graph: fx.Graph) -> Roles:
    """Find them. A linear with no role that is known here has the role "other"; with several ("q", "k", "v" of one matrix) their joint name."""
    linears = {n: found for n in graph.nodes if (found := linear_of(n)) is not None}
    result = Roles(linears)
    names: dict[str, list[str]] = {}

    def note(role: str, nodes: Iterable[fx.Node]) -> None:
        for n in nodes:
            have = names.setdefault(linears[n].module, [])
            if role not in have:
                have.append(role)

    for q, k, v, out in _attention(graph):
        for role, node in (("q", q), ("k", k), ("v", v)):
            note(role, _nearest(node, linears, lambda n: n.all_input_nodes))
        note("o", _nearest(out, linears, lambda n: n.users, inclusive=False))
    for node in graph.nodes:
        block = _gated(node, linears)
        if block is not None:
            result.gated.append(block)
            for role, linear in (("gate", block.gate), ("up", block.up), ("down", block.down)):
                note(role, [linear.node])
    result.of = {linear.module: _join(names.get(linear.module, [])) for linear in linears.values()}
    return result


def _join(found: list[str]) -> str:
    return "".join(found) if set(found) <= {"q", "k", "v"} and found else ("_".join(found) or "other")


def linear_of(node: fx.Node) -> Linear | None:
    """The linear that a node is, dense or packed."""
    site = read(node)
    module, cls = compat.module_of(node)
    if site is not None:
        weight = compat.example_value(site.weight) if isinstance(site.weight, fx.Node) else None
        if site.kind != "linear" or not isinstance(weight, Tensor) or weight.dim() != 2 or not module or not isinstance(site.x, fx.Node):
            return None
        if site.weight.op != "placeholder":
            return None
        n, k = weight.shape
        return Linear(node, site.x, module, (k, n) if site.transposed else (n, k))
    if node.op != "call_function" or not str(node.target).startswith("effllm.") or cls is None or not issubclass(cls, PackedLinear):
        return None
    value = compat.example_value(node)
    x = node.args[0] if node.args else None
    if is_op(node, "quantize_activation") or not isinstance(value, Tensor) or not isinstance(x, fx.Node):
        return None
    if is_op(node, "bipolar_linear_a8"):  # (quantize_activation(x)[0], ...)
        x = x.all_input_nodes[0].args[0]
        assert isinstance(x, fx.Node)
    return Linear(node, x, module, (value.shape[-1], compat.example_value(x).shape[-1]))


def _attention(graph: fx.Graph) -> Iterable[tuple[Any, Any, Any, fx.Node]]:
    """(query, key, value, result) of every attention core."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in compat.ATTENTION:
            yield *node.args[:3], node
        elif is_softmax(node):
            scores = _nearest(node.all_input_nodes[0], lambda n: n.target in _MATMULS, lambda n: n.all_input_nodes)
            mixed = _nearest(node, lambda n: n.target in _MATMULS, lambda n: n.users, inclusive=False)
            if len(scores) == 1 and len(mixed) == 1:
                yield scores[0].args[0], scores[0].args[1], mixed[0].args[1], mixed[0]


def is_softmax(node: fx.Node) -> bool:
    """Whether a node is a softmax, as function or method."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and name == "softmax"


def _nearest(start: Any, wanted: Any, step: Callable[[fx.Node], Iterable[fx.Node]], inclusive: bool = True) -> list[fx.Node]:
    """The first nodes that are wanted on every path from `start`; other attention cores end a path."""
    hit = wanted if callable(wanted) else wanted.__contains__
    found: list[fx.Node] = []
    seen: set[fx.Node] = set()
    todo = [start] if inclusive else list(step(start))
    while todo:
        node = todo.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if hit(node):
            found.append(node)
        elif not (node.op == "call_function" and node.target in compat.ATTENTION):
            todo += step(node)
    return found


def _gated(node: fx.Node, linears: dict[fx.Node, Linear]) -> Gated | None:
    """The gated MLP whose product a node is."""
    product = (node.op == "call_function" and node.target in _PRODUCTS) or (node.op == "call_method" and node.target == "mul")
    if not product or len(node.args) != 2 or not all(isinstance(a, fx.Node) for a in node.args):
        return None
    for act, other in (node.args, node.args[::-1]):
        assert isinstance(act, fx.Node) and isinstance(other, fx.Node)
        source = _activated(act)
        if source is None:
            continue
        gate, up = _half(source, linears), _half(other, linears)
        down = _after(node, linears)
        if gate is None or up is None or down is None or down.x is not node:
            continue
        if gate[0] is up[0]:
            if {gate[1], up[1]} == {0, 1}:
                return Gated(act, node, gate[0], up[0], down, other, up[1])
        elif gate[1] is None and up[1] is None and gate[0].x is up[0].x:
            return Gated(act, node, gate[0], up[0], down, other)
    return None


def _activated(node: fx.Node) -> fx.Node | None:
    """What an activation function reads, thresholds after it aside."""
    if is_op(node, "sparsify"):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return _activated(source)
    function = node.op == "call_function" and node.target in _ACTIVATIONS
    first = node.args[0] if node.args else None
    return first if function and isinstance(first, fx.Node) else None


def _half(node: fx.Node, linears: dict[fx.Node, Linear]) -> tuple[Linear, int | None] | None:
    """The linear that a value is, or is half of (0: the first outputs)."""
    if node in linears:
        return linears[node], None
    if node.op != "call_function" or node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
        return None
    source, index = node.args
    assert isinstance(source, fx.Node)
    if source in linears:  # y[..., :n]
        n = linears[source].shape[0]
        last = index[-1] if isinstance(index, tuple) else None
        if isinstance(last, slice) and last.step in (None, 1) and n % 2 == 0 and isinstance(index, tuple) and all(_everything(i) for i in index[:-1]):
            if (last.start in (None, 0)) and last.stop == n // 2:
                return linears[source], 0
            if last.start == n // 2 and last.stop in (None, n):
                return linears[source], 1
        return None
    name = source.target if isinstance(source.target, str) else getattr(source.target, "__name__", "")
    parent = source.args[0] if source.args else None
    if name in ("chunk", "split") and isinstance(parent, fx.Node) and parent in linears and isinstance(index, int) and index in (0, 1):
        value, whole = compat.example_value(node), linears[parent].shape[0]
        if isinstance(value, Tensor) and value.shape[-1] * 2 == whole:
            return linears[parent], 0 if index == 0 else 1
    return None


def _everything(index: Any) -> bool:
    return index is Ellipsis or index == slice(None, None, None)


def _after(node: fx.Node, linears: dict[fx.Node, Linear]) -> Linear | None:
    """The one linear that reads a value."""
    found = [linears[u] for u in _readers(node) if u in linears]
    return found[0] if len(found) == 1 and len(_readers(node)) == 1 else None


def _readers(node: fx.Node) -> list[fx.Node]:
    """Users, through an activation quantization."""
    out: list[fx.Node] = []
    for user in node.users:
        if is_op(user, "quantize_activation"):
            out += {n for item in user.users for n in item.users}
        else:
            out.append(user)
    return out

