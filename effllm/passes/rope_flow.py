"""Where positions meet content in a graph: attention sites, the rotations before them, and leaks around them.

A node is coloured by what it depends on: CONTENT (the tokens) or ANGLE (the positions). Nodes with both colours before an attention
must all belong to a rotation of queries or keys; attention itself cuts the colour, since a rotation of both sides is all it sees.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from effllm import compat

CONTENT, ANGLE = 1, 2
_SOFTMAX = (torch.nn.functional.softmax, torch.softmax, "softmax")
_MATMUL = (torch.matmul, torch.bmm, operator.matmul, "matmul", "bmm")
_SAME = (  # one tensor in, the same values out in another shape or type
    "view", "reshape", "transpose", "permute", "contiguous", "expand", "unsqueeze", "squeeze", "flatten", "to", "float", "type_as", "repeat_interleave",
    torch.transpose, torch.permute, torch.reshape, torch.flatten, torch.unsqueeze, torch.squeeze, torch.repeat_interleave,
)  # fmt: skip
_REARRANGE = (*_SAME, operator.getitem, "chunk", "split", "unbind", "select", "narrow", torch.chunk, torch.split, torch.unbind, torch.cat, torch.stack,
              torch.view_as_complex, torch.view_as_real, operator.neg, torch.neg, "neg")  # fmt: skip
_PRODUCT = (operator.mul, torch.mul, "mul", operator.truediv, torch.div, "div", *_MATMUL, torch.einsum)
_SUM = (operator.add, torch.add, "add", operator.sub, torch.sub, "sub", operator.iadd)
_SCORES = (*_SAME, *_SUM, *_PRODUCT[:6], "masked_fill", torch.where, operator.getitem)


class Refused(Exception):
    """Why a site is not proved to be rotary."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


@dataclass(frozen=True)
class Attention:
    """An attention and its operands."""

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node | None


@dataclass(frozen=True)
class Slice:
    """The part of a graph that turns `root` (content before its rotation) into `turned`, of the same shape; `nodes` in graph order."""

    root: fx.Node
    turned: fx.Node
    nodes: tuple[fx.Node, ...]


def attentions(graph: fx.Graph) -> list[Attention]:
    """Every attention: calls of torch's function, and products whose softmax multiplies again."""
    found = []
    for node in graph.nodes:
        if node.op == "call_function" and node.target in compat.ATTENTION:
            q, k, v = (_argument(node, i, name) for i, name in enumerate(("query", "key", "value")))
            found.append(Attention(node, q, k, v))
        elif node.op in ("call_function", "call_method") and node.target in _SOFTMAX:
            scores = _scores(node)
            if scores is not None:
                found.append(Attention(scores, scores.args[0], scores.args[1], None))  # type: ignore[arg-type]
    return found


def _argument(node: fx.Node, index: int, name: str) -> fx.Node:
    value = node.args[index] if len(node.args) > index else node.kwargs[name]
    assert isinstance(value, fx.Node)
    return value


def _scores(softmax: fx.Node) -> fx.Node | None:
    """The product of queries and keys behind a softmax."""
    node: object = softmax.args[0]
    while isinstance(node, fx.Node) and node.target not in _MATMUL and node.target in _SCORES and node.args:
        node = node.args[0]
    whole = isinstance(node, fx.Node) and node.target in _MATMUL and all(isinstance(a, fx.Node) for a in node.args[:2])
    return node if whole else None  # type: ignore[return-value]


def colours(graph: fx.Graph, content: Iterable[fx.Node], angle: Iterable[fx.Node], cuts: Iterable[fx.Node]) -> dict[fx.Node, int]:
    """What every node depends on; `cuts` (attentions) depend on content alone."""
    colour = dict.fromkeys(content, CONTENT) | dict.fromkeys(angle, ANGLE)
    cut = set(cuts)
    for node in graph.nodes:
        if node not in colour:
            colour[node] = 0
            for source in node.all_input_nodes:
                colour[node] |= colour[source]
        if node in cut:
            colour[node] = CONTENT
        if writes(node):  # what reads the buffer from here on sees it changed
            colour[node.all_input_nodes[0]] |= colour[node]
    return colour


def writes(node: fx.Node) -> bool:
    """Whether a node changes its first argument in place."""
    return node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__") and bool(node.all_input_nodes)


def rotation(operand: fx.Node, colour: dict[fx.Node, int]) -> tuple[Slice, set[fx.Node]] | None:
    """The rotation that makes an operand of attention, and all mixed nodes on its way; None where positions do not enter.

    Raises Refused where a mixed node is not linear in the content, or content comes from more than one place.
    """
    if colour[operand] != CONTENT | ANGLE:
        return None
    chain = [operand]
    while chain[-1].target in _SAME or _adds_axes(chain[-1]):
        chain.append(chain[-1].all_input_nodes[0])
    region: set[fx.Node] = set()
    border: set[fx.Node] = set()
    todo = [chain[-1]]
    while todo:
        node = todo.pop()
        if node in region or node in border:
            continue
        if colour[node] == CONTENT | ANGLE:
            _need_linear(node, colour)
            region.add(node)
            todo += node.all_input_nodes
        elif colour[node] == CONTENT:
            border.add(node)
    rank = {n: i for i, n in enumerate(operand.graph.nodes)}
    while len(border) > 1:
        last = max(border, key=rank.__getitem__)
        if last.target not in _REARRANGE:
            raise Refused("two-sources", f"content comes from {len(border)} places, one of them {_called(last)}")
        border.remove(last)
        region.add(last)
        border |= {n for n in last.all_input_nodes if colour[n] == CONTENT}
    if not border:
        raise Refused("no-content", f"{operand.name} does not depend on the tokens")
    root = border.pop()
    shape = _shape(root)
    turned = next((n for n in chain if _shape(n) == shape), None)
    if turned is None:
        raise Refused("shape", f"the rotation changes the shape {shape} of {root.name}")
    inner = region | set(chain[chain.index(turned) :])
    return Slice(root, turned, tuple(sorted(inner, key=rank.__getitem__))), region | set(chain)


def _adds_axes(node: fx.Node) -> bool:
    """x[:, :, None] and the like: every entry a whole slice or a new axis."""
    if node.target is not operator.getitem or not isinstance(node.args[1], tuple):
        return False
    return all(i is None or i is Ellipsis or i == slice(None) for i in node.args[1])


def _need_linear(node: fx.Node, colour: dict[fx.Node, int]) -> None:
    if node.target in _REARRANGE or node.target in _SUM:
        return
    if node.target in _PRODUCT:
        if sum(bool(colour[n] & CONTENT) for n in node.all_input_nodes) < 2:
            return
        raise Refused("product", f"{_called(node)} multiplies content by content where positions enter")
    raise Refused("not-linear", f"positions enter through {_called(node)}, which is no rotation of queries or keys")


def _called(node: fx.Node) -> str:
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"{node.name} ({target})"


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    value = compat.example_value(node)
    return tuple(value.shape) if isinstance(value, Tensor) else None
