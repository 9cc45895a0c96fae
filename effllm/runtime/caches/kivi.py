"""KIVI (arXiv 2402.02750): keys quantized per channel over groups of tokens, values per token over groups of channels.

Keys are stored after the rotary embedding. A page holds, per head,

    kcodes  (page / 16, D / (4 F), 64)  rows tokens, columns channels     kscale, kmin  (page / group, D) fp16
    vcodes  (D / 16, page / (4 F), 64)  rows channels, columns tokens     vscale, vmin  (D / vgroup, page) fp16

with F = 8 / bits and vgroup = min(group, D): (2 bits + 32 / group + 32 / vgroup) / 8 bytes a channel and token for keys and values
together. Unlike in the paper's code keys and values leave the dense window together, one page at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from effllm.errors import CacheError
from effllm.runtime.caches.base import CacheFormat
from effllm.runtime.caches.codes import dequantize, pack, quantize, unpack
from effllm.runtime.caches.layout import Field, Layout

Quantized = tuple[Tensor, Tensor, Tensor]  # codes, scale, minimum


@dataclass(frozen=True)
class Kivi(CacheFormat):
    """`bits`: 2, 4 or 8. `group`: tokens (keys) or channels (values) that share a scale and a minimum."""

    bits: int = 4
    group: int = 64

    name: ClassVar[str] = "kivi"

    def check(self, heads: int, dim: int) -> None:
        """Bits, and that page, group and head size go into one another."""
        super().check(heads, dim)
        if self.bits not in (2, 4, 8):
            raise CacheError("E-KVC-VALUE", f"{self.name}: bits={self.bits}", "bits is 2, 4 or 8")
        if self.group < 16 or self.group % 16 or self.page % self.group:
            raise CacheError("E-KVC-VALUE", f"{self.name}: group={self.group}, page={self.page}", "group is a multiple of 16 and divides page")
        if dim % 16 or dim % self.vgroup(dim or 16):
            what = f"{self.name}: heads of {dim} channels with groups of {self.group}"
            raise CacheError("E-KVC-SHAPE", what, "16 and min(group, head size) must divide the head size")

    def vgroup(self, dim: int) -> int:
        """Channels of a value that share a scale."""
        return min(self.group, dim)

    def layout(self, heads: int, dim: int, dtype: torch.dtype) -> Layout:
        """See the top of the file."""
        f, half = 8 // self.bits, torch.float16
        keys = (self.page // self.group, dim)
        values = (dim // self.vgroup(dim), self.page)
        return Layout(heads, (
            Field("kcodes", torch.uint8, (self.page // 16, dim // (4 * f), 64)), Field("kscale", half, keys), Field("kmin", half, keys),
            Field("vcodes", torch.uint8, (dim // 16, self.page // (4 * f), 64)), Field("vscale", half, values), Field("vmin", half, values),
        ))  # fmt: skip

    def encode(self, k: Tensor, v: Tensor, tables: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """Quantize and pack."""
        return self.packed(quantize(k.float(), self.bits, self.group), quantize(v.float().transpose(-1, -2), self.bits, self.vgroup(v.shape[-1])))

    def packed(self, k: Quantized, v: Quantized) -> dict[str, Tensor]:
        """The fields of quantized keys (page, D) and transposed values (D, page)."""
        (kc, ks, km), (vc, vs, vm) = k, v
        return {"kcodes": pack(kc, self.bits), "kscale": ks, "kmin": km, "vcodes": pack(vc, self.bits), "vscale": vs, "vmin": vm}

    def decode(self, held: Mapping[str, Tensor], tables: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """codes * scale + minimum."""
        k = dequantize(unpack(held["kcodes"], self.bits), held["kscale"], held["kmin"], self.group)
        vc = unpack(held["vcodes"], self.bits)
        v = dequantize(vc, held["vscale"], held["vmin"], self.vgroup(vc.shape[-2]))
        return k, v.transpose(-1, -2)
