"""Block floating point keys and values, key channels sorted so that outliers share blocks (arXiv 2403.20137).

Formats: effllm.runtime.formats.kv.bfp; per head and page of T tokens

    kcodes (T, D / 2 for at most 4 bits, else D)   kexp (T, D / block) int8   vcodes, vexp alike with `vbits`

Keys lie in the order of table 0, (heads, D) int64: stored channel i is channel order[i]; attention takes queries in that order. That is way "post" or
"layout" of effllm.solvers.kv.ksort; for way "pair", where the weights are permuted, and for no sorting, the table counts up. Values have table 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from effllm.errors import CacheError
from effllm.runtime.caches.base import CacheFormat
from effllm.runtime.caches.layout import Field, Layout
from effllm.runtime.formats.kv import bfp


@dataclass(frozen=True)
class Bfp(CacheFormat):
    """`bits`, `vbits`: mantissa bits of keys and values with sign, 2 to 8. `block`: channels that share an exponent. `rule`: "clip" or "raise"."""

    bits: int = 4
    vbits: int = 4
    block: int = 32
    rule: str = "clip"

    name: ClassVar[str] = "bfp"

    def check(self, heads: int, dim: int) -> None:
        """Bits, rule, and blocks that divide the head."""
        super().check(heads, dim)
        try:
            for bits in (self.bits, self.vbits):
                bfp.check(dim, bits, self.block, self.rule)
        except CacheError as error:
            code = "E-KVC-SHAPE" if error.code == "E-KVC-GROUP" else "E-KVC-VALUE"
            raise CacheError(code, f"{self.name}: {error.cause}", error.next_step) from None

    def layout(self, heads: int, dim: int, dtype: torch.dtype) -> Layout:
        """See the top of the file."""
        fields = []
        for side, bits in (("k", self.bits), ("v", self.vbits)):
            packed = bits <= 4
            fields.append(Field(f"{side}codes", torch.uint8 if packed else torch.int8, (self.page, dim // 2 if packed else dim)))
            fields.append(Field(f"{side}exp", torch.int8, (self.page, dim // self.block)))
        return Layout(heads, tuple(fields))

    def encode(self, k: Tensor, v: Tensor, tables: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """Sort and quantize."""
        out: dict[str, Tensor] = {}
        for side, x, bits, order in (("k", k, self.bits, tables[0]), ("v", v, self.vbits, tables[1])):
            made = bfp.encode(x.gather(-1, order[:, None].expand(x.shape)), bits, self.block, self.rule)
            out |= {f"{side}codes": made.codes, f"{side}exp": made.exponent}
        return out

    def decode(self, held: Mapping[str, Tensor], tables: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """In the model's order of channels."""
        out = []
        for side, bits, order in (("k", self.bits, tables[0]), ("v", self.vbits, tables[1])):
            x = bfp.decode(bfp.Bfp(held[f"{side}codes"], held[f"{side}exp"]), bits)
            out.append(x.gather(-1, order.argsort(-1)[:, None].expand(x.shape)))
        return out[0], out[1]

    def tables(self, heads: int, dim: int, device: torch.device) -> list[Tensor]:
        """No sorting."""
        return [torch.arange(dim, device=device).repeat(heads, 1) for _ in range(2)]

    def table_shapes(self, heads: int, dim: int) -> Sequence[tuple[int, ...]]:
        """The orders of key and of value channels."""
        return [(heads, dim)] * 2
