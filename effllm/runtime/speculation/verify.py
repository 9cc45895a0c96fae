"""From a drafted tree and the target's opinion of its nodes to the tokens that are kept: a path from the root, and one token after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from effllm.runtime.speculation import rejection
from effllm.runtime.speculation.tree import Tree


def sampled(tree: Tree, target: Callable[[int], Tensor], generator: torch.Generator | None) -> tuple[list[int], int]:
    """Accepted nodes from below the root, and a token after the last of them; jointly distributed as the target's own draws.

    `target(node)` is the target's distribution (V,) of what follows a node; only asked for nodes that are reached.
    """
    path, node = list[int](), 0
    while True:
        q, children = target(node), tree.children(node)
        if not children:
            return path, _draw(q.double(), generator)
        siblings = [tree.tokens[c] for c in children]
        found, left = rejection.recursive(q, tree.drafts[node], siblings, lambda: float(torch.rand((), dtype=torch.float64, generator=generator)))
        if found is None:
            return path, _draw(left, generator)
        node = children[found]
        path.append(node)


def greedy(tree: Tree, best: Sequence[int]) -> tuple[list[int], int]:
    """The same for greedy decoding; best[i] is the target's choice after node i."""
    path, node = list[int](), 0
    while True:
        token = int(best[node])
        below = next((c for c in tree.children(node) if tree.tokens[c] == token), None)
        if below is None:
            return path, token
        path.append(below)
        node = below


def _draw(q: Tensor, generator: torch.Generator | None) -> int:
    return int(torch.multinomial(q, 1, generator=generator))
