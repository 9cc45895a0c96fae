"""Decisions of the pass "compressed_attention" for a device that is not here."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map

from effllm import compat
from effllm.passes.base import Context
from effllm.passes.compressed_attention import CompressedAttention
from effllm.recipe import Recipe
from effllm.report import Decision
from effllm.runtime.caches.layer import Layer


def decisions(spec: str, device: str) -> list[Decision]:
    """Append and attention of one decoding step of four heads over two key heads: the graph of a CPU, its values said to be on `device`."""
    made = Layer(spec, 100)
    k, q = torch.randn(1, 2, 1, 32), torch.randn(1, 4, 1, 32)
    made.allocate(k, k)
    found: list[Decision] = []

    def step(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        keys, values = made.update(k, k)
        count = keys.shape[2]
        keys, values = (t[:, :, None, :, :].expand(1, 2, 2, count, 32).reshape(1, 4, count, 32) for t in (keys, values))
        mask = torch.arange(count) < made.lens[0]
        return torch.nn.functional.scaled_dot_product_attention(q, keys, values, mask[None, None, None])

    def look(gm: torch.fx.GraphModule, _: Any) -> Any:
        mode = compat.fake_mode(gm.graph)

        def moved(t: Any) -> Any:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device) if isinstance(t, torch.Tensor) else t

        for node in gm.graph.nodes:
            with mode:
                compat.set_example_value(node, tree_map(moved, compat.example_value(node)))
        found.extend(CompressedAttention().run(gm.graph, Context(Recipe(()))).decisions)
        return lambda *args: (torch.zeros(1, 4, 1, 32),)

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(step, backend=look, fullgraph=True)(q, k)
    return found
