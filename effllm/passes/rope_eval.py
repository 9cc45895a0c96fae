"""Runs parts of a Dynamo graph in fp64 on real tensors: the position-dependent nodes, and the slice that rotates a vector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from effllm import compat
from effllm.passes.rope_flow import ANGLE, CONTENT, Refused, Slice, writes

_CASTS = ("to", "float", "double", "half", "bfloat16", "type_as", "type")


def wide(value: Any) -> Any:
    """Floating tensors in fp64, complex ones in complex128, in copies; anything else as it is."""
    if isinstance(value, Tensor):
        kind = torch.complex128 if value.is_complex() else torch.float64 if value.is_floating_point() else value.dtype
        return value.detach().to(kind, copy=True)
    if isinstance(value, tuple | list):
        return type(value)(wide(v) for v in value)
    return value


def call(node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    """A node's value on the values of its inputs. Casts to floating types widen to fp64, so that nothing is rounded on the way."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
    if node.op == "call_method":
        expected = compat.example_value(node)
        if node.target in _CASTS and isinstance(expected, Tensor) and isinstance(args[0], Tensor):
            return args[0].to(torch.complex128 if expected.is_complex() else torch.float64 if expected.is_floating_point() else expected.dtype)
        result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return result if str(node.target).endswith("_") else _keep(result)
    assert callable(node.target)
    return _keep(node.target(*args, **kwargs))


def _keep(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.to(torch.float64)
    return value


class Evaluator:
    """Rotations of a graph as functions of positions.

    `tokens` is the number of positions that the graph was traced for; `epsilon` the coarsest rounding in the tables it reads.
    """

    def __init__(self, graph: fx.Graph, positions: list[fx.Node], colour: dict[fx.Node, int]) -> None:
        self.positions, self.colour = positions, colour
        self.shape = tuple(compat.example_value(positions[0]).shape) if positions else (1, 1)
        self.tokens = self.shape[-1]
        # constants and angles, in order, so that buffers that the graph updates are read as updated
        self.nodes = [n for n in graph.nodes if n.op in ("call_function", "call_method") and not colour[n] & CONTENT]
        feeds = {i for n in self.nodes if colour[n] & ANGLE or n.all_input_nodes for i in n.all_input_nodes}
        self.tables = {n: t for n in graph.nodes if n in feeds and n.op == "placeholder" and (t := compat.real_tensor(n)) is not None}
        floats = [torch.finfo(t.dtype).eps for t in self.tables.values() if t.is_floating_point() and not isinstance(t, torch.nn.Parameter)]
        self.epsilon = max(floats, default=0.0) and max(*floats, torch.finfo(torch.float32).eps)  # tables are computed in fp32
        self._held: tuple[bytes, dict[fx.Node, Any]] = (b"", {})

    def _angles(self, positions: Tensor) -> dict[fx.Node, Any]:
        """Values of all nodes that do not depend on content; the last ones are kept, since every layer asks for the same."""
        key = positions.numpy().tobytes()
        if self._held[0] == key:
            return self._held[1]
        device = next((t.device for t in self.tables.values()), torch.device("cpu"))
        env: dict[fx.Node, Any] = {n: wide(t) for n, t in self.tables.items()}
        env |= dict.fromkeys(self.positions, positions.to(device).expand(self.shape).contiguous())
        for node in self.nodes:
            if all(n in env for n in node.all_input_nodes) and (node.all_input_nodes or isinstance(compat.example_value(node), Tensor)):
                env[node] = call(node, env)
            elif writes(node) and self.colour[node] & ANGLE:
                raise Refused("unknown", f"{node.name} changes a buffer by what cannot be computed from positions")
        self._held = (key, env)
        return env

    def apply(self, part: Slice) -> Any:
        """The slice as a function: positions (n,) to vectors and their rotations (n, rows, D), fp64; n = `tokens`."""
        shape = tuple(compat.example_value(part.root).shape)
        axes = [i for i, n in enumerate(shape[:-1]) if n == self.tokens]
        if len(axes) != 1:
            raise Refused("axis", f"no single axis of {shape} is that of the {self.tokens} tokens")
        g = torch.Generator().manual_seed(1)
        x = torch.randn(shape, generator=g, dtype=torch.float64)

        def run(positions: Tensor) -> tuple[Tensor, Tensor]:
            env = dict(self._angles(positions))
            env[part.root] = x.to(next((v.device for v in env.values() if isinstance(v, Tensor)), x.device))
            for node in part.nodes:
                if node not in env:
                    missing = [n.name for n in node.all_input_nodes if n not in env]
                    if missing:
                        raise Refused("unknown", f"{node.name} needs {missing[0]}, which cannot be computed from positions")
                    env[node] = call(node, env)
            flat = [t.movedim(axes[0], 0).reshape(self.tokens, -1, shape[-1]).cpu() for t in (env[part.root], env[part.turned])]
            return flat[0], flat[1]

        return run

    def source(self, part: Slice) -> str:
        """Name of the buffer that the angles of a slice come from, where it is one."""
        seen: set[fx.Node] = set()
        todo = list(part.nodes)
        names = set()
        while todo:
            node = todo.pop()
            if node in seen or node is part.root or (self.colour[node] & CONTENT and node not in part.nodes):
                continue
            seen.add(node)
            if node.op == "placeholder" and node not in self.positions:
                names.add(compat.parameter_name(node))
            todo += node.all_input_nodes
        return names.pop() if len(names) == 1 else ""
