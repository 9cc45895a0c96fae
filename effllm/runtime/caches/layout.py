"""Records of bytes: where each tensor of a page lies, and the way in and out.

A page is one uint8 row. It holds one record per key head, one behind the other (or a single record for all heads), each a sequence of
fields at offsets that are multiples of 64 bytes, so that a kernel streams one contiguous record per key head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGN = 64  # bytes: a cache line, and a whole vector register of the widest instruction set


@dataclass(frozen=True)
class Field:
    """One tensor of a record."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes without the filling behind it."""
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """`heads` equal records a page, each with the fields in order; None for one record that is shared by all heads."""

    heads: int | None
    fields: tuple[Field, ...]

    @property
    def records(self) -> int:
        """Records a page."""
        return 1 if self.heads is None else self.heads

    def offsets(self) -> dict[str, int]:
        """Byte offset of each field inside a record."""
        out, at = {}, 0
        for f in self.fields:
            out[f.name] = at
            at += -(-f.nbytes // ALIGN) * ALIGN
        return out

    @property
    def record(self) -> int:
        """Bytes of a record, filling included."""
        return sum(-(-f.nbytes // ALIGN) * ALIGN for f in self.fields)

    @property
    def page(self) -> int:
        """Bytes of a page, filling included."""
        return self.records * self.record

    @property
    def payload(self) -> int:
        """Bytes of a page without filling: what the formula of a method counts."""
        return self.records * sum(f.nbytes for f in self.fields)

    def write(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """uint8 (..., page) of fields (..., heads, *shape), without the heads where they share a record."""
        lead = self._lead(tensors[self.fields[0].name], self.fields[0])
        out = tensors[self.fields[0].name].new_zeros((*lead, self.records, self.record), dtype=torch.uint8)
        for f in self.fields:
            t = tensors[f.name].to(f.dtype).reshape(*lead, self.records, -1).contiguous()
            at = self.offsets()[f.name]
            if f.nbytes:
                out[..., at : at + f.nbytes] = t.view(torch.uint8)
        return out.reshape(*lead, self.page)

    def read(self, pages: Tensor) -> dict[str, Tensor]:
        """The fields (..., heads, *shape), without the heads where they share a record, of uint8 (..., page)."""
        lead = pages.shape[:-1]
        rows = pages.reshape(*lead, self.records, self.record)
        own = () if self.heads is None else (self.heads,)
        found = {}
        for f in self.fields:
            at = self.offsets()[f.name]
            found[f.name] = rows[..., at : at + f.nbytes].contiguous().view(f.dtype).reshape(*lead, *own, *f.shape)
        return found

    def _lead(self, t: Tensor, f: Field) -> tuple[int, ...]:
        depth = len(f.shape) + (self.heads is not None)
        return tuple(t.shape[: t.dim() - depth])
