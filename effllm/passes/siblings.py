"""What passes that merge sibling linears share: the outputs of one call, side by side, as views in the places of the calls that were merged.

A bias (Qwen2's q, k, v) is added to its own view behind the call, where Inductor fuses it into what reads the view and a step program adds it in place:
one rounding more than inside of the kernel, and no call of its own for the sake of a bias.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from effllm import compat
from effllm.passes.base import Context, call, replace
from effllm.passes.manager import differs


def other_dtype(node: fx.Node, bias: Any) -> str:
    """Why a bias cannot be added behind the call; empty where it can or there is none."""
    mine, own = compat.example_value(node).dtype, None if bias is None else compat.example_value(bias).dtype
    return "" if own in (None, mine) else f"its bias is {own} beside outputs of {mine}"


def split(graph: fx.Graph, context: Context, merged: fx.Node, nodes: list[fx.Node], bias: Callable[[fx.Node], Any]) -> None:
    """Put views of `merged`, in the order of `nodes`, in their places, each plus its bias."""
    at = 0
    for node in nodes:
        size = int(compat.example_value(node).shape[-1])
        with graph.inserting_before(node):
            view = call(graph, torch.narrow, (merged, -1, at, size), node)
            part = view if bias(node) is None else call(graph, torch.add, (view, bias(node)), node)
            if differs(compat.example_value(node), compat.example_value(part)):  # several rows: a linear's output is contiguous; fuses into its consumers
                part = call(graph, torch.Tensor.contiguous, (part,), node)
        at += size
        replace(context, node, part)
    context.changed.append(merged)
