"""The neutral format: pages in the model's own dtype, so attention over them equals dense attention bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from effllm.runtime.caches.base import CacheFormat
from effllm.runtime.caches.layout import Field, Layout


@dataclass(frozen=True)
class Dense(CacheFormat):
    """Keys and values as they are."""

    name: ClassVar[str] = "dense"
    exact: ClassVar[bool] = True

    def layout(self, heads: int, dim: int, dtype: torch.dtype) -> Layout:
        """k and v (page, dim) per head."""
        return Layout(heads, (Field("k", dtype, (self.page, dim)), Field("v", dtype, (self.page, dim))))

    def encode(self, k: Tensor, v: Tensor, tables: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """Nothing to do."""
        return {"k": k, "v": v}

    def decode(self, held: Mapping[str, Tensor], tables: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The values in fp32."""
        return held["k"].float(), held["v"].float()
