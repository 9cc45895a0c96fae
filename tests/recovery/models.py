"""A small language model with low-rank linears, and its dense teacher."""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LowRank(nn.Module):
    """y = a (b x), the least that a compressed module has."""

    recovery_factors: ClassVar[tuple[str, ...]] = ("a", "b")
    recovery_pair: ClassVar[tuple[str, str]] = ("a", "b")

    def __init__(self, w: Tensor, rank: int) -> None:
        super().__init__()
        u, s, vh = torch.linalg.svd(w.detach().double(), full_matrices=False)
        self.a = nn.Parameter((u[:, :rank] * s[:rank].sqrt()).to(w.dtype), requires_grad=False)
        self.b = nn.Parameter((s[:rank].sqrt()[:, None] * vh[:rank]).to(w.dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.b), self.a)

    def shrink(self, rank: int) -> None:
        self.a = nn.Parameter(self.a[:, :rank].clone(), requires_grad=False)
        self.b = nn.Parameter(self.b[:rank].clone(), requires_grad=False)


class Block(nn.Module):
    """Norm, a mean over the past (so that context matters), two linears, a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        past = h.cumsum(1) / torch.arange(1, h.shape[1] + 1, device=h.device)[:, None].to(h.dtype)
        return x + self.down(F.gelu(self.up(h + past)))


class Small(nn.Module):
    """ids (B, T) to logits (B, T, vocabulary); `cap` bends the logits, so that no module makes them."""

    def __init__(self, vocabulary: int = 40, width: int = 24, blocks: int = 3, cap: bool = False) -> None:
        super().__init__()
        self.emb = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.cap = cap

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.emb(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))
        return 8 * torch.tanh(logits / 8) if self.cap else logits


def dense(seed: int = 0, **options: object) -> Small:
    """A teacher whose answers are far from uniform."""
    torch.manual_seed(seed)
    model = Small(**options).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.3)
    return model


def low_rank(teacher: Small, rank: int = 5) -> Small:
    """A copy whose block linears are low-rank."""
    model = copy.deepcopy(teacher)
    for layer in model.layers:
        layer.up = LowRank(layer.up.weight, rank)
    return model


def windows(count: int = 24, length: int = 12, vocabulary: int = 40, seed: int = 3) -> Tensor:
    """Token ids (count, length)."""
    return torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state."""
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())
