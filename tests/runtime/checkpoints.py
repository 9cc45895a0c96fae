"""Small models for checkpoint tests, with codes from plain integer arithmetic so that every version of torch makes the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effllm.runtime.formats import bipolar
from effllm.runtime.formats.base import Packed
from effllm.runtime.header import NAME, seal
from effllm.runtime.packed import PackedEmbedding, PackedLinear
from effllm.runtime.weights import BipolarWeight


class Small(nn.Module):
    """Embedding, norm, linear, tied head, and a buffer outside of the state dict; 40 is no multiple of the group of 32."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(48, 40, padding_idx=3)
        self.norm = nn.LayerNorm(40)
        self.proj = nn.Linear(40, 40)
        self.head = nn.Linear(40, 48, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.zeros(5, 40), persistent=False)
        self.register_buffer("flag", torch.zeros((), dtype=torch.bool))

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) to logits (B, T, 48)."""
        x = self.norm(self.embed(ids) + self.table[: ids.shape[1]])
        return self.head(x + torch.tanh(self.proj(x)))


def pattern(n: int, k: int, bits: int, grid: str, group: int = 32, step: int = 7, dtype: torch.dtype = torch.float16) -> Packed:
    """A weight whose codes and scales (eight octaves of them) follow a formula."""
    kp, g = bipolar.padded(k, group), bipolar.groups(k, group)
    codes = (torch.arange(n * kp).view(n, kp) * step // 3 + 5 * torch.arange(n)[:, None]) % 2**bits
    octave = torch.arange(n * g).view(n, g) % 8
    scale = (2.0 ** (-octave.float() - 3 - bits) * 1.375).to(dtype)
    minimum = (-scale.float() * (2**bits - 2)).to(dtype) if grid == "affine" else None
    return bipolar.make(codes.to(torch.uint8), scale, minimum, k=k, bits=bits, group=group, grid=grid)


def small(embed: Packed | None = None, proj: Packed | None = None, act: str = "a16", kernel: str | None = "reference") -> Small:
    """`Small` with its embedding and head packed to 8 bits and its linear to 4."""
    model = Small().eval()
    table = BipolarWeight(embed or pattern(48, 40, 8, "integer"), kernel=kernel)
    inner = BipolarWeight(proj or pattern(40, 40, 4, "affine", step=11), act=act, kernel=kernel)
    model.embed, model.head = PackedEmbedding(table, 3), PackedLinear(table)
    model.proj = PackedLinear(inner, (torch.arange(40) - 20) / 64)
    model.norm.weight = nn.Parameter(1 + torch.arange(40) / 256)
    model.norm.bias = nn.Parameter(torch.arange(40) / 512 - 0.03125)
    model.table.copy_((torch.arange(200).view(5, 40) % 9 - 4) / 32)
    model.flag.fill_(True)
    return model


def skeleton() -> Small:
    """What `load(model=...)` takes."""
    with torch.device("meta"):
        return Small()


IDS = torch.tensor([[0, 3, 47, 12, 9], [5, 5, 31, 2, 40]])


def logits(model: nn.Module) -> Tensor:
    """What the model says to IDS."""
    with torch.no_grad():
        out: Tensor = model(IDS)
    return out


def edit_header(folder: Path, change: Callable[[dict[str, Any]], Any], reseal: bool = True) -> None:
    """Change effllm.json in place, with a fitting hash unless told otherwise."""
    header = json.loads((folder / NAME).read_text())
    change(header)
    if reseal:
        header["sha256"] = seal(header)
    (folder / NAME).write_text(json.dumps(header))
