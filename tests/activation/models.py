"""A small decoder with a gated MLP, and token windows for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from effllm.autotune import skip_gain

VOCAB, WIDTH, INNER = 40, 32, 48


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(WIDTH, INNER)
        self.act, self.down = nn.SiLU(), nn.Linear(INNER, WIDTH)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        q, k, v = (p(h).unflatten(-1, (2, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        x = x + self.o(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = self.second(x)
        return x + self.down(self.up(h) * self.act(self.gate(h)))


class Decoder(nn.Module):
    """Two layers; `rescale` makes the up projection's channels differ, as they do in trained models."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        with torch.no_grad():
            for layer in self.layers:
                layer.up.weight.mul_(torch.logspace(-1, 1, INNER)[:, None])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def decoder(seed: int = 0) -> Decoder:
    return Decoder(seed).eval()


def windows(count: int = 130, length: int = 128, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))


def take_to_win(monkeypatch: Any) -> None:
    """Skipping kernels that are predicted to lose, which is a matter of the processor, are taken to win."""
    real = skip_gain.gain

    def gain(problem: Any) -> skip_gain.Gain:
        found = real(problem)
        return skip_gain.Gain(found.dense / 2, found.dense, found.kernel, found.reason) if found.kernel and found.speedup < 1 else found

    monkeypatch.setattr(skip_gain, "gain", gain)
