"""MatryoshkaKV (arXiv 2410.14731): keys and values projected onto the leading columns of an orthogonal basis per key head.

A page of T tokens holds, in one record for all heads, r_g the rank of head g,

    k  for every head (T, r_g) of (k - mean) U_r in the model's dtype, one behind the other        v  alike

Bytes: 2 (sum of key ranks + sum of value ranks) a token of 16-bit numbers. Keys are projected after the rotary embedding. Tables: key bases
(heads, D, D) fp32, key means (heads, D), value bases, value means. The softmax scale is that of whole heads.
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


@dataclass(frozen=True)
class Matryoshka(CacheFormat):
    """`k`, `v`: ranks, "full", a number of columns or a share of the head below 1 for all heads, or one number per head: "32/48/16"."""

    k: str = "0.5"
    v: str = "0.5"

    name: ClassVar[str] = "matryoshka"

    def ranks(self, heads: int, dim: int) -> tuple[list[int], list[int]]:
        """Ranks of the key heads, for keys and for values. Raises CacheError (E-KVC-VALUE, E-KVC-SHAPE)."""
        return _ranks("k", self.k, heads, dim), _ranks("v", self.v, heads, dim)

    def check(self, heads: int, dim: int) -> None:
        """Ranks for every head, inside the head."""
        super().check(heads, dim)
        self.ranks(heads, dim)

    def layout(self, heads: int, dim: int, dtype: torch.dtype) -> Layout:
        """See the top of the file."""
        return Layout(None, tuple(Field(n, dtype, (self.page * sum(r),)) for n, r in zip("kv", self.ranks(heads, dim), strict=True)))

    def encode(self, k: Tensor, v: Tensor, tables: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """Project; sums in fp64, so that their order does not show in what is stored: a kernel packs the same bytes."""
        out = {}
        for n, x, u, mean, ranks in zip("kv", (k, v), tables[::2], tables[1::2], self.ranks(k.shape[-3], k.shape[-1]), strict=True):
            z = (x.double() - mean[:, None]) @ u.double()
            out[n] = torch.cat([z[..., g, :, :r].flatten(-2) for g, r in enumerate(ranks)], -1).float().to(x.dtype)
        return out

    def decode(self, held: Mapping[str, Tensor], tables: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """mean + z U_r^T."""
        heads, dim, _ = tables[0].shape
        out = []
        for n, u, mean, ranks in zip("kv", tables[::2], tables[1::2], self.ranks(heads, dim), strict=True):
            parts = held[n].float().split([self.page * r for r in ranks], -1)
            rows = [z.unflatten(-1, (self.page, r)) @ u[g, :, :r].mT + mean[g] for g, (z, r) in enumerate(zip(parts, ranks, strict=True))]
            out.append(torch.stack(rows, -3))
        return out[0], out[1]

    def tables(self, heads: int, dim: int, device: torch.device) -> list[Tensor]:
        """The channels themselves as basis, which is only sensible at full rank. Raises CacheError (E-KVC-BASIS) below."""
        if any(r < dim for side in self.ranks(heads, dim) for r in side):
            raise CacheError("E-KVC-BASIS", f"{self.spec} needs a basis of the model's keys and values", "pass tables, as effllm.hf.kv_calibrate makes them")
        return pack_tables(*(t for _ in range(2) for t in (torch.eye(dim, device=device).repeat(heads, 1, 1), torch.zeros(heads, dim, device=device))))

    def table_shapes(self, heads: int, dim: int) -> Sequence[tuple[int, ...]]:
        """Basis and mean of keys, then of values."""
        return [(heads, dim, dim), (heads, dim)] * 2


def pack_tables(uk: Tensor, mk: Tensor, uv: Tensor, mv: Tensor) -> list[Tensor]:
    """The tables of a layer from bases (heads, D, D) and means (heads, D). Raises CacheError (E-KVC-BASIS) where a basis is not orthogonal."""
    for u in (uk, uv):
        if float((u.double().mT @ u.double() - torch.eye(u.shape[-1], dtype=torch.float64, device=u.device)).abs().max()) > 1e-4:
            raise CacheError("E-KVC-BASIS", "a basis is not orthogonal", "take it from effllm.solvers.kv.basis.pca or .cayley.rotation")
    return [t.float().contiguous() for t in (uk, mk, uv, mv)]


def _ranks(key: str, text: str, heads: int, dim: int) -> list[int]:
    step = "give a number of columns, a share below 1, or one number per head with slashes"
    if text == "full":
        return [dim] * heads
    try:
        given = [float(part) for part in str(text).split("/")]
    except ValueError:
        raise CacheError("E-KVC-VALUE", f"matryoshka: {key}={text!r}", step) from None
    if len(given) == 1 and 0 < given[0] < 1:
        given = [max(1.0, float(round(given[0] * dim)))] if dim else [1.0]
    if any(r < 1 or r != int(r) for r in given):
        raise CacheError("E-KVC-VALUE", f"matryoshka: {key}={text!r}", step)
    if dim and (len(given) not in (1, heads) or max(given) > dim):
        raise CacheError("E-KVC-SHAPE", f"matryoshka: {key}={text!r} for {heads} heads of {dim} channels", step)
    return [int(r) for r in (given * heads if len(given) == 1 else given)]
