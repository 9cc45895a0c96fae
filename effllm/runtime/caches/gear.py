"""GEAR (arXiv 2403.05527): KIVI codes, a low-rank correction of what they lose, and a few exact outliers.

    X ~ dequant(codes) + A B^T + S

S holds, for each vector of a page, its ceil(outliers * length / 2) largest and as many smallest entries: a vector is one channel over the
page's tokens for keys, one token over its channels for values. They are replaced by the vector's mean before quantization, and S is what
is missing at their places, so they come out exact. A B^T is a rank-`rank` power iteration on the rest. Every page has factors of its own
(the streaming buffer of the paper is the page), so prompts and decoded tokens are treated alike. Beyond the fields of KIVI a page holds,
per head,

    ka, va  (rank, page)     kb, vb  (rank, D)     fp16, or with `factors=8` the upper byte of it (e5m2: range of fp16, 2 bits behind the leading one)
    kidx    (D, nk) uint8, kval (D, nk) fp16     vidx  (page, nv) uint8, vval (page, nv) fp16
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from effllm.errors import CacheError
from effllm.runtime.caches.codes import dequantize, quantize
from effllm.runtime.caches.kivi import Kivi, Quantized
from effllm.runtime.caches.layout import Field, Layout


@dataclass(frozen=True)
class Gear(Kivi):
    """`rank` of the correction, `outliers` as a share of each vector, `loops` of the power iteration, `rounds` of quantizing anew what the
    correction leaves, `factors` the bits of an element of A or B, 16 or 8: rounding a correction by 7 % costs half a percent of what it corrects.
    rank=0, outliers=0 is KIVI."""

    rank: int = 2
    outliers: float = 0.02
    loops: int = 3
    rounds: int = 1
    factors: int = 16

    name: ClassVar[str] = "gear"

    def check(self, heads: int, dim: int) -> None:
        """Beyond KIVI: rank and outliers have to fit the page."""
        super().check(heads, dim)
        if not (0 <= self.rank <= min(self.page, dim or self.page) and 0 <= self.outliers <= 1 and self.loops >= 1 and self.rounds >= 1):
            step = "rank is at most page and head size, outliers lies in 0 to 1, loops and rounds are at least 1"
            raise CacheError("E-KVC-VALUE", f"gear: rank={self.rank}, outliers={self.outliers}, loops={self.loops}, rounds={self.rounds}", step)
        if self.factors not in (8, 16):
            raise CacheError("E-KVC-VALUE", f"gear: factors={self.factors}", "factors is 8 or 16")
        if max(self.page, dim) > 256:
            what = f"gear: pages of {self.page} tokens" + (f", heads of {dim} channels" if dim else "")
            raise CacheError("E-KVC-SHAPE", what, "both are at most 256: outliers have 8-bit indices")

    def counts(self, dim: int) -> tuple[int, int]:
        """Exact entries of a key channel over a page and of a value over its channels; halves from either end, all of them at most."""
        return tuple(min(n, 2 * math.ceil(self.outliers * n / 2)) for n in (self.page, dim))  # type: ignore[return-value]

    @property
    def factor(self) -> torch.dtype:
        """Of the factors as stored."""
        return torch.float16 if self.factors == 16 else torch.float8_e5m2

    def layout(self, heads: int, dim: int, dtype: torch.dtype) -> Layout:
        """See the top of the file."""
        half, (nk, nv) = torch.float16, self.counts(dim)
        more = [Field(n, self.factor, (self.rank, size)) for n, size in (("ka", self.page), ("kb", dim), ("va", self.page), ("vb", dim))]
        more += [Field("kidx", torch.uint8, (dim, nk)), Field("kval", half, (dim, nk))]
        more += [Field("vidx", torch.uint8, (self.page, nv)), Field("vval", half, (self.page, nv))]
        return Layout(heads, (*super().layout(heads, dim, dtype).fields, *more))

    def encode(self, k: Tensor, v: Tensor, tables: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """Both matrices are compressed as (vector position, vector): keys (page, D), values transposed (D, page)."""
        k, v = k.float(), v.float().transpose(-1, -2)
        nk, nv = self.counts(k.shape[-1])
        kc, ka, kb, kidx, kval = self._compress(k, self.group, nk)
        vc, vb, va, vidx, vval = self._compress(v, self.vgroup(v.shape[-2]), nv)
        more = {"ka": ka, "kb": kb, "va": va, "vb": vb, "kidx": kidx, "kval": kval, "vidx": vidx, "vval": vval}
        return self.packed(kc, vc) | more

    def _compress(self, x: Tensor, group: int, count: int) -> tuple[Quantized, Tensor, Tensor, Tensor, Tensor]:
        """x (..., M, N), vectors along M: quantized, factors (..., r, M) and (..., r, N), indices and corrections (..., N, count).

        What is summed is summed in fp64, so that its order does not show in the halves that are stored: a kernel packs the same bytes.
        """
        index = extremes(x, count)
        low = torch.zeros_like(x)
        for _ in range(self.rounds):
            quantized = quantize(fill((x - low).float(), index), self.bits, group)
            held = dequantize(*quantized, group)
            rest = (x - held).scatter(-2, index, 0.0).double()
            a, b = (t.float().to(self.factor) for t in power_iteration(rest, self.rank, self.loops))
            low = a.double() @ b.double().transpose(-1, -2)
        exact = (x - low - held).gather(-2, index).float()
        return quantized, a.transpose(-1, -2), b.transpose(-1, -2), index.transpose(-1, -2).to(torch.uint8), exact.transpose(-1, -2)

    def decode(self, held: Mapping[str, Tensor], tables: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Codes plus factors plus corrections."""
        k, v = super().decode(held, tables)
        k = k + held["ka"].float().transpose(-1, -2) @ held["kb"].float()
        v = v + held["va"].float().transpose(-1, -2) @ held["vb"].float()
        k = k.transpose(-1, -2).scatter_add(-1, held["kidx"].long(), held["kval"].float()).transpose(-1, -2)
        return k, v.scatter_add(-1, held["vidx"].long(), held["vval"].float())


def extremes(x: Tensor, count: int) -> Tensor:
    """Positions (..., count, N) of the count / 2 largest and count / 2 smallest entries of each vector of x (..., M, N); distinct."""
    m = x.shape[-2]
    if count >= m:
        return torch.arange(m, device=x.device)[:, None].expand(x.shape).contiguous()
    if count == 2:  # what sorting gives, twenty times as fast: the first of equal smallest, the last of equal largest
        return torch.stack([x.argmin(-2), m - 1 - x.flip(-2).argmax(-2)], -2)
    order = x.sort(dim=-2, stable=True).indices
    return torch.cat([order[..., : count // 2, :], order[..., m - count // 2 :, :]], -2)


def fill(x: Tensor, index: Tensor) -> Tensor:
    """x (..., M, N) with the entries at `index` (..., count, N) replaced by their vector's mean."""
    if index.shape[-2] == 0:
        return x
    return x.scatter(-2, index, x.double().mean(-2, keepdim=True).float().expand(index.shape).contiguous())


def power_iteration(e: Tensor, rank: int, loops: int) -> tuple[Tensor, Tensor]:
    """Factors A (..., M, r) with orthonormal columns and B (..., N, r) of e (..., M, N) ~ A B^T, each matrix by itself.

    Starts from the same matrix each time, so a page's bytes depend on the page alone. Zero where e is zero.
    """
    n = e.shape[-1]
    if rank == 0:
        return e.new_zeros(*e.shape[:-1], 0), e.new_zeros(*e.shape[:-2], n, 0)
    p = first(n, rank, e.device).to(e).expand(*e.shape[:-2], n, rank)
    q = e.new_zeros(*e.shape[:-1], rank)
    for _ in range(loops):
        q = orthonormal(e @ orthonormal(p))
        p = e.transpose(-1, -2) @ q
    return q, p


def first(n: int, rank: int, device: torch.device) -> Tensor:
    """Where the iteration starts: fp64 (n, rank), numbers without a pattern in -1 to 1 that a kernel makes alike: a hash of row and column in 32 bits."""
    row, column = (torch.arange(1, size + 1, device=device) for size in (n, rank))
    h = (row[:, None] * 2654435761 + column * 2246822519) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 2246822519) & 0xFFFFFFFF
    return (h ^ (h >> 13)).double() / 2.0**31 - 1.0


def orthonormal(x: Tensor) -> Tensor:
    """Gram-Schmidt, twice, on the columns of x (..., M, r); columns without a remainder become zero."""
    columns: list[Tensor] = []
    for i in range(x.shape[-1]):
        c = x[..., i]
        size = c.norm(dim=-1, keepdim=True)
        for _ in range(2):
            for other in columns:
                c = c - (other * c).sum(-1, keepdim=True) * other
        left = c.norm(dim=-1, keepdim=True)
        columns.append(torch.where(left <= 1e-6 * size, torch.zeros_like(c), c / left.clamp_min(1e-30)))
    return torch.stack(columns, -1)
