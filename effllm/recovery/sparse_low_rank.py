"""SLTrain's trainable linear (arXiv 2406.02214): W = (alpha / r) a b + S with S on a fixed random support.

    a (N, r), b (r, K), S: `values` (nnz,) at row i, column columns[j] for offsets[i] <= j < offsets[i + 1]
    y = x W^T,  dW = G^T x,  da = (alpha / r) dW b^T,  db = (alpha / r) a^T dW,  dS = dW at the support,  dx = G W

W and dW exist for `_TILE` rows at a time, in the forward pass too: what autograd keeps is x and the parameters.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from effllm.errors import WeightError

_TILE = 256  # rows of W alive at once


class SparseLowRankLinear(nn.Module):
    """Linear with a low-rank and a sparse part, both trained.

    density: share of the N K positions in the support, drawn uniformly without repetition from `seed`; alpha / rank scales a b.
    Starts as SLTrain does: b uniform with kaiming's bound, a zero, values uniform in +-1 / sqrt(K). Raises WeightError
    (E-WGT-RANK, E-WGT-SPARSE).
    """

    recovery_factors: ClassVar[tuple[str, ...]] = ("a", "b", "values")
    recovery_pair: ClassVar[tuple[str, str]] = ("a", "b")
    columns: Tensor
    offsets: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        density: float,
        *,
        alpha: float | None = None,
        bias: bool = True,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        n, k = out_features, in_features
        if not 0 < rank <= min(n, k):
            raise WeightError("E-WGT-RANK", f"rank {rank} of a {n} x {k} weight", f"give a rank of 1 to {min(n, k)}")
        if not 0 <= density < 1:
            raise WeightError("E-WGT-SPARSE", f"a density of {density}", "give a share of the weights in [0, 1)")
        self.in_features, self.out_features, self.rank = k, n, rank
        self.scale = (rank if alpha is None else alpha) / rank
        generator = torch.Generator().manual_seed(seed)
        flat = uniform_support(n * k, round(density * n * k), generator)
        self._support(flat)
        bound = k**-0.5

        def uniform(*shape: int) -> Tensor:
            return ((torch.rand(*shape, generator=generator) * 2 - 1) * bound).to(dtype)

        self.a = nn.Parameter(torch.zeros(n, rank, dtype=dtype))
        self.b = nn.Parameter(uniform(rank, k))
        self.values = nn.Parameter(uniform(len(flat)))
        if bias:
            self.bias = nn.Parameter(uniform(n))
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_dense(cls, w: Tensor, rank: int, density: float, *, bias: Tensor | None = None, seed: int = 0) -> SparseLowRankLinear:
        """Start from a weight w (N, K): its truncated SVD, and on the support what that leaves over."""
        n, k = w.shape
        made = cls(k, n, rank, density, bias=bias is not None, seed=seed, dtype=w.dtype)
        made.to(w.device)
        u, sigma, vh = torch.linalg.svd(w.detach().double(), full_matrices=False)
        root = sigma[:rank].sqrt()
        with torch.no_grad():
            made.a.copy_(u[:, :rank] * root)
            made.b.copy_(root[:, None] * vh[:rank])
            left = w.detach().double() - made.a.double() @ made.b.double()
            made.values.copy_(left.flatten()[made.flat_support()])
            if bias is not None:
                made.bias.copy_(bias)
        return made

    def _support(self, flat: Tensor) -> None:
        n, k = self.out_features, self.in_features
        counts = torch.bincount(flat // k, minlength=n)
        self.register_buffer("offsets", torch.cat([counts.new_zeros(1), counts.cumsum(0)]))
        self.register_buffer("columns", (flat % k).int())

    def flat_support(self) -> Tensor:
        """Sorted positions row * K + column (nnz,), int64."""
        n = self.out_features
        rows = torch.repeat_interleave(torch.arange(n, device=self.columns.device), self.offsets.diff())
        return rows * self.in_features + self.columns

    def dense(self) -> Tensor:
        """The weight (N, K)."""
        return _tile(self.a.detach(), self.b.detach(), self.values.detach(), self.columns, self.offsets, self.scale, 0, self.out_features)

    def shrink(self, rank: int) -> None:
        """Keep the first ranks only; the scale alpha / r stays what it is."""
        if not 0 < rank <= self.rank:
            raise WeightError("E-WGT-RANK", f"rank {rank} out of {self.rank}", f"give 1 to {self.rank}")
        self.a = nn.Parameter(self.a.detach()[:, :rank].clone(), self.a.requires_grad)
        self.b = nn.Parameter(self.b.detach()[:rank].clone(), self.b.requires_grad)
        self.rank = rank

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) to (..., N)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        flat = x.reshape(-1, self.in_features)
        y: Tensor = _Product.apply(flat, self.a, self.b, self.values, self.columns, self.offsets, self.scale)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{self.out_features}x{self.in_features}, rank={self.rank}, nnz={len(self.values)}"


def uniform_support(size: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` different positions out of `size`, uniform, sorted, int64; memory in proportion to `count`."""
    if count > size // 2:
        return torch.randperm(size, generator=generator)[:count].sort().values
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < count:
        more = torch.randint(size, (count - len(found) + count // 8 + 16,), generator=generator)
        found = torch.cat([found, more]).unique()
    # any set of this size is as likely as another, so is a random part of it
    return found[torch.randperm(len(found), generator=generator)[:count]].sort().values


def _tile(a: Tensor, b: Tensor, values: Tensor, columns: Tensor, offsets: Tensor, scale: float, start: int, stop: int) -> Tensor:
    """Rows start..stop of W."""
    w = a[start:stop] @ b
    w *= scale
    at = _positions(columns, offsets, b.shape[1], start, stop)
    w.view(-1)[at] += values[int(offsets[start]) : int(offsets[stop])].to(w.dtype)  # no position twice
    return w


def _positions(columns: Tensor, offsets: Tensor, k: int, start: int, stop: int) -> Tensor:
    """Flat positions of the support within a tile of rows."""
    counts = offsets[start : stop + 1].diff()
    rows = torch.repeat_interleave(torch.arange(stop - start, device=columns.device), counts)
    return rows * k + columns[int(offsets[start]) : int(offsets[stop])]


class _Product(torch.autograd.Function):
    """x W^T with gradients that never hold a dense dW."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, values: Tensor, columns: Tensor, offsets: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, a, b, values, columns, offsets)
        ctx.scale = scale
        tiles = [_tile(a, b, values, columns, offsets, scale, i, min(i + _TILE, len(a))).to(x.dtype) for i in range(0, len(a), _TILE)]
        return torch.cat([x @ w.t() for w in tiles], -1) if len(tiles) > 1 else x @ tiles[0].t()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, values, columns, offsets = ctx.saved_tensors
        g, scale = grads[0], ctx.scale
        need_x, need_a, need_b, need_v = ctx.needs_input_grad[:4]
        dx = torch.zeros_like(x) if need_x else None
        da = torch.empty_like(a) if need_a else None
        # summed over the tiles: in fp32 where the factors are narrower
        db = torch.zeros_like(b, dtype=torch.promote_types(b.dtype, torch.float32)) if need_b else None
        dv = torch.empty_like(values) if need_v else None
        for start in range(0, len(a), _TILE):
            stop = min(start + _TILE, len(a))
            part = g[:, start:stop]
            if dx is not None:
                dx += part @ _tile(a, b, values, columns, offsets, scale, start, stop).to(x.dtype)
            if da is None and db is None and dv is None:
                continue
            dw = (part.t() @ x).to(b.dtype)
            if da is not None:
                da[start:stop] = (dw @ b.t()) * scale
            if db is not None:
                db += (a[start:stop].t() @ dw) * scale
            if dv is not None:
                at = _positions(columns, offsets, b.shape[1], start, stop)
                dv[int(offsets[start]) : int(offsets[stop])] = dw.view(-1)[at].to(dv.dtype)
        return dx, da, None if db is None else db.to(b.dtype), dv, None, None, None
