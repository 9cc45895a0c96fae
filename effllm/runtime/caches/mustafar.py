"""Mustafar (arXiv 2505.22913): every token keeps the largest channels of its key and of its value, the rest is zero.

Pages of bitmap tiles, see effllm.runtime.formats.kv.bitmap; per head and page of T tokens, K of D channels kept,

    kval  (T K)  kept key elements     kmap (T / 64, D) int64            kscale (T, 2) fp16, only for 4 and 8 bits
    vval  (T K)  kept value elements   vmap (T, ceil(D / 64)) int64      vscale (T, 2) fp16

of 2 (bits K + D) / 8 bytes a token for keys and values (D a multiple of 64), 8 more for the scales. Elements come before maps, so that a
kernel may read a register's width past them. Keys are pruned after the rotary embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from effllm.errors import CacheError
from effllm.runtime.caches.base import CacheFormat
from effllm.runtime.caches.layout import Field, Layout
from effllm.runtime.formats.kv import bitmap


@dataclass(frozen=True)
class Mustafar(CacheFormat):
    """`sparsity`: share of the channels of a token that are dropped, 0 to below 1. `bits`: 16 (the model's dtype), 8 or 4 for what is kept."""

    page: int = bitmap.PAGE
    window: int = 32
    sparsity: float = 0.5
    bits: int = 16

    name: ClassVar[str] = "mustafar"

    def check(self, heads: int, dim: int) -> None:
        """Whole tiles, a share that leaves something, known bits."""
        super().check(heads, dim)
        if self.page % bitmap.TILE:
            raise CacheError("E-KVC-VALUE", f"{self.name}: page={self.page}", f"page is a multiple of {bitmap.TILE}")
        if self.bits not in bitmap.BITS:
            raise CacheError("E-KVC-VALUE", f"{self.name}: bits={self.bits}", "bits is 4, 8 or 16")
        bitmap.keep_count(dim, self.sparsity)

    def layout(self, heads: int, dim: int, dtype: torch.dtype) -> Layout:
        """See the top of the file."""
        count = self.page * bitmap.keep_count(dim, self.sparsity)
        held = Field("val", dtype, (count,)) if self.bits == 16 else Field("val", torch.uint8, (count * self.bits // 8,))
        maps = ((self.page // bitmap.TILE, dim), (self.page, math.ceil(dim / bitmap.TILE)))
        fields = []
        for side, shape in zip("kv", maps, strict=True):
            fields += [Field(side + held.name, held.dtype, held.shape), Field(f"{side}map", torch.int64, shape)]
            if self.bits < 16:
                fields.append(Field(f"{side}scale", torch.float16, (self.page, 2)))
        return Layout(heads, tuple(fields))

    def encode(self, k: Tensor, v: Tensor, tables: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """Prune and pack."""
        out: dict[str, Tensor] = {}
        for side, x in (("k", k), ("v", v)):
            made = bitmap.encode(x, self.sparsity, keys=side == "k", bits=self.bits, page=self.page)
            out |= {f"{side}val": made.values.squeeze(-2), f"{side}map": made.bitmap.squeeze(-3)}
            if made.scale is not None:
                out[f"{side}scale"] = made.scale.squeeze(-3)
        return out

    def decode(self, held: Mapping[str, Tensor], tables: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Zeros filled in."""
        dim = held["kmap"].shape[-1]

        def side(name: str) -> Tensor:
            scale = held.get(f"{name}scale")
            stored = bitmap.Bitmap(held[f"{name}map"].unsqueeze(-3), held[f"{name}val"].unsqueeze(-2), None if scale is None else scale.unsqueeze(-3))
            return bitmap.decode(stored, dim, keys=name == "k", bits=self.bits)

        return side("k"), side("v")
