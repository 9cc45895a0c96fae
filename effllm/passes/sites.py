"""The nodes of a Dynamo graph that multiply by a parameter or look rows of one up, whatever op they are written with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from effllm import compat
from effllm.report import Decision


@dataclass(frozen=True)
class Site:
    """A node to look at: y = x W^T + bias ("linear") or rows x of W ("embedding"); `transposed`: W is held as (in, out)."""

    node: fx.Node
    kind: str
    x: fx.Node
    weight: Any
    bias: Any = None
    transposed: bool = False


def read(node: fx.Node) -> Site | None:
    """The site that a node is, if it is one."""
    if node.op != "call_function":
        return None

    def given(*names: str) -> list[Any]:
        values = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        return [values.get(n) for n in names]

    if node.target in compat.LINEAR:
        x, weight, bias = given("input", "weight", "bias")
        return Site(node, "linear", x, weight, bias)
    if node.target in compat.EMBEDDING:
        x, weight = given("input", "weight")
        return Site(node, "embedding", x, weight)
    if node.target in compat.ADDMM and not {"alpha", "beta"} & set(node.kwargs):
        bias, x, weight = given("input", "mat1", "mat2")
        held = isinstance(weight, fx.Node) and weight.op == "placeholder" and isinstance(compat.real_tensor(weight), nn.Parameter)
        if held and isinstance(bias, fx.Node) and compat.example_value(bias).dim() == 1 and isinstance(x, fx.Node):
            return Site(node, "linear", x, weight, bias, transposed=True)
    return None


def others(graph: fx.Graph) -> list[Decision]:
    """Parameters of two or more dimensions that ops other than the sites read: stacked experts, convolutions, plain products."""
    found = []
    for node in graph.nodes:
        real = compat.real_tensor(node) if node.op == "placeholder" else None
        if not isinstance(real, nn.Parameter) or real.dim() < 2 or not real.is_floating_point():
            continue
        users = [u for u in node.users if u.op != "output" and read(u) is None]
        if users:
            names = sorted({u.target if isinstance(u.target, str) else getattr(u.target, "__name__", str(u.target)) for u in users})
            reason = f"a parameter of shape {tuple(real.shape)} that {', '.join(names)} reads; only linear, embedding and addmm with a vector are rewritten"
            found.append(Decision(node.name, compat.parameter_name(node), "kept", "other-op", reason))
    return found
