"""Drafted tokens as a tree whose root is the last token that is certain. A chain is a tree without siblings.

Nodes are numbered in the order in which they are drafted, so a parent comes before its children and siblings stand in sampling order.
A forward over all nodes has node i in row i; it sees its ancestors and itself, and its position is that of the root plus its depth.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Tree:
    """`tokens`, `parents`, `depths` of N nodes; node 0 is the root, its own parent. `drafts[i]`: what node i's children were drawn from (V,)."""

    tokens: list[int]
    parents: list[int] = field(default_factory=lambda: [0])
    depths: list[int] = field(default_factory=lambda: [0])
    drafts: dict[int, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(root: int) -> Tree:
        """A tree of the root alone."""
        return Tree([root])

    def add(self, parent: int, token: int) -> int:
        """A new node; its number."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        return len(self.tokens) - 1

    def __len__(self) -> int:
        return len(self.tokens)

    def children(self, node: int) -> list[int]:
        """In sampling order."""
        return [i for i in range(node + 1, len(self)) if self.parents[i] == node]

    def path(self, node: int) -> list[int]:
        """The nodes from below the root down to `node`; empty for the root."""
        nodes: list[int] = []
        while node:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    @property
    def is_chain(self) -> bool:
        """Whether each node but the last has one child."""
        return all(p == max(0, i - 1) for i, p in enumerate(self.parents))

    def sight(self) -> Tensor:
        """(N, N) bool: row i has its ancestors and itself."""
        seen = torch.zeros(len(self), len(self), dtype=torch.bool)
        for i, parent in enumerate(self.parents):
            seen[i] = seen[parent]
            seen[i, i] = True
        return seen
