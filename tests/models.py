"""Small models that the tests share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Two siblings, one output projection with a bias, one that is alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width // 2, bias=False)
        self.o = nn.Linear(width + width // 2, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.o(torch.cat([self.q(x), self.k(x)], -1).relu())


class Tied(nn.Module):
    """Embedding, blocks, and a head tied to the embedding."""

    def __init__(self, vocab: int = 48, width: int = 64, blocks: int = 2) -> None:
        super().__init__()
        self.emb = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.lm_head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


class One(nn.Module):
    """A single linear behind a relu."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.w = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.w(x))


def relative(a: Tensor, b: Tensor) -> float:
    """Relative Frobenius distance of a to b."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
