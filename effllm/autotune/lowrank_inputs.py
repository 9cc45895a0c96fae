"""Random operands of the low-rank ops: what a candidate is verified and timed on (see inputs.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from effllm.autotune.inputs import Expected, Operands, copied, parts
from effllm.errors import TuneError
from effllm.lowering.op import Problem
from effllm.runtime import layouts
from effllm.runtime.formats import bipolar as grid


def lowrank(problem: Problem, layout: str, copies: int, seed: int) -> Operands:
    """Operands of lowrank_linear, lowrank_linear_many and sparse_lowrank_linear. Raises TuneError for sizes that cannot be."""
    del layout  # there is one
    detail = dict(problem.detail)
    rank, count, nonzeros = (int(detail.get(name, 0)) for name in ("rank", "channels", "nonzeros"))
    m, n, k = problem.m or 1, problem.n, problem.k
    if not 0 < rank <= 1 << 20 or not 0 <= count <= k or not 0 <= nonzeros <= n * k:
        raise TuneError("E-TUN-SHAPE", f"{problem.op}: {detail}", "give a positive rank, and no more channels or nonzeros than the weight has")
    factor, device = getattr(torch, str(detail["factor"])), problem.device
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(m, k, generator=g) * 2.0 ** torch.randint(-3, 2, (m, 1), generator=g)).to(problem.dtype)
    many = problem.op.endswith("_many")
    sizes, ranks = zip(*siblings(n, rank), strict=True) if many else ([n], [rank])
    # rows over a wide range, so that swapped rows or ranks cannot hide
    pivoted = bool(detail.get("pivoted"))
    if pivoted and any(r >= size for size, r in zip(sizes, ranks, strict=True)):
        raise TuneError("E-TUN-SHAPE", f"{problem.op}: {detail}", "pivots need ranks below the numbers of outputs")
    pivots = [torch.randperm(size, generator=g) for size in sizes] if pivoted else []
    a = [_spread(size - r if pivoted else size, r + count, g).to(factor) for size, r in zip(sizes, ranks, strict=True)]
    b = [_spread(r, k, g).to(factor) for r in ranks]
    channels = torch.randperm(k, generator=g)[:count].sort().values if count else None
    dense = torch.zeros(n, k)
    tail: tuple[Tensor | None, ...] = (channels, pivots[0] if pivots else None, None)
    if problem.op == "sparse_lowrank_linear":
        at = torch.randperm(n * k, generator=g)[:nonzeros].sort().values
        values = torch.randn(nonzeros, generator=g).to(factor)
        dense.view(-1)[at] = values.float()
        rows = torch.zeros(n + 1, dtype=torch.int64)
        rows[1:] = torch.bincount(at // k, minlength=n).cumsum(0)
        tail = (values, (at % k).to(torch.uint16 if k <= 1 << 16 else torch.int32), rows.int(), None)

    def put(value: Any) -> Any:
        return [put(v) for v in value] if isinstance(value, list) else None if value is None else value.to(device)

    args = (put(x), put(a), put(b), put(pivots)) if many else (put(x), put(a[0]), put(b[0]), *(put(t) for t in tail))
    nbytes = sum(t.numel() * t.element_size() for t in (*a, *b, *(t for t in tail if t is not None)))
    made = Operands([args], nbytes, lambda: _expected(x, a, b, channels, pivots, dense if nonzeros else None, problem.dtype))
    return made if copies == 1 else copied(made, copies)


def siblings(n: int, rank: int) -> list[tuple[int, int]]:
    """Outputs and ranks of the low-rank weights that a merged problem is made of. Raises TuneError as `parts` does."""
    sizes = parts(n)
    return [(size, rank // len(sizes) + (i < rank % len(sizes))) for i, size in enumerate(sizes)]


def full_siblings(n: int, rank: int) -> list[tuple[int, int]]:
    """The same where ranks fill whole tiles too, as those of bipolar factors do."""
    sizes, ranks = parts(n), parts(rank)
    if len(sizes) != len(ranks):
        raise TuneError("E-TUN-SHAPE", f"rank {rank} is too small for {len(sizes)} siblings", f"give at least {16 * len(sizes)}")
    return list(zip(sizes, ranks, strict=True))


def bipolar(problem: Problem, layout: str, copies: int, seed: int) -> Operands:
    """Operands of lowrank_bipolar_linear and its _many. Raises TuneError for sizes that cannot be."""
    detail = {name: int(value) for name, value in problem.detail}
    m, n, k, rank = problem.m or 1, problem.n, problem.k, detail["rank"]
    first, second = (detail["b_bits"], detail["b_group"], bool(detail["b_affine"])), (problem.bits, problem.group, problem.affine)
    if rank < 1 or any(not 1 <= bits <= 8 or group not in (grid.CHANNEL, *grid.GROUPS) for bits, group, _ in (first, second)):
        raise TuneError("E-TUN-SHAPE", f"{problem.op}: {detail}", f"give a positive rank, 1 to 8 bits and groups of {(grid.CHANNEL, *grid.GROUPS)}")
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(m, k, generator=g) * 2.0 ** torch.randint(-3, 2, (m, 1), generator=g)).to(problem.dtype)
    many = problem.op.endswith("_many")
    dense: list[list[Tensor]] = [[], []]
    stored: list[list[dict[str, Tensor]]] = [[], []]
    for size, r in full_siblings(n, rank) if many else [(n, rank)]:
        for which, (rows, columns, of) in enumerate(((size, r, second), (r, k, first))):
            packed = _random(rows, columns, *of, problem.scale_dtype, g)
            dense[which].append(grid.unpack(packed))
            stored[which].append({key: t.to(problem.device) for key, t in layouts.get(layout).repack(packed).items()})
    keys = ("codes", "scale", "minimum")
    zeros = [grid.zero_point(bits, "affine" if affine else "symmetric") for bits, _, affine in (second, first)]
    tail = (*second[:2], zeros[0], *first[:2], zeros[1])
    args: tuple[Any, ...]
    if many:
        args = (x.to(problem.device), *([p[key] for p in of] if key in of[0] else [] for of in stored for key in keys), *tail)
    else:
        args = (x.to(problem.device), *(of[0].get(key) for of in stored for key in keys), None, None, n, rank, *tail)
    nbytes = sum(t.numel() * t.element_size() for of in stored for p in of for t in p.values())
    made = Operands([args], nbytes, lambda: _expected(x, dense[0], dense[1], None, [], None, problem.dtype))
    return made if copies == 1 else copied(made, copies)


def _random(rows: int, columns: int, bits: int, group: int, affine: bool, dtype: torch.dtype, g: torch.Generator) -> grid.Packed:
    groups = grid.groups(columns, group)
    codes = torch.randint(0, 2**bits, (rows, grid.padded(columns, group)), generator=g, dtype=torch.uint8)
    scale = (torch.rand(rows, groups, generator=g) + 0.5) * 2.0 ** torch.randint(-4, 3, (rows, groups), generator=g) / 2**bits
    low = torch.randn(rows, groups, generator=g).to(dtype) if affine else None
    return grid.make(codes, scale.to(dtype), low, k=columns, bits=bits, group=group, grid="affine" if affine else "symmetric")


def _spread(rows: int, columns: int, g: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=g) * 2.0 ** torch.randint(-3, 3, (rows, 1), generator=g) / columns**0.5


def _expected(
    x: Tensor, a: list[Tensor], b: list[Tensor], channels: Tensor | None, pivots: list[Tensor], sparse: Tensor | None, dtype: torch.dtype
) -> list[Expected]:  # fmt: skip
    def product(to: torch.dtype) -> Tensor:
        xs, found = x.to(to), []
        for i, (first, second) in enumerate(zip(b, a, strict=True)):
            middle = linear(xs, first.to(to))
            if channels is not None:
                middle = torch.cat([middle, xs[:, channels]], -1)
            found.append(linear(middle, second.to(to)))
            if pivots:
                found[-1] = torch.cat([middle, found[-1]], -1)[:, pivots[i].argsort()]
        y = torch.cat(found, -1)
        return y if sparse is None else y + linear(xs, sparse.to(to))

    n = sum(p.shape[0] for p in pivots) or sum(f.shape[0] for f in a)
    return [Expected(lambda y: y.reshape(-1, n), product(torch.float64), product(dtype))]
