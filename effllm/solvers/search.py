"""Data-free scale search: per group, the scale (and minimum) of least squared error.

Clip ratios are tried first (a clipped outlier is often cheaper than a coarse grid for everybody else), then scale and codes are
refined in turn: given codes, the best scale (and minimum) is a closed-form least-squares fit. Scales are rounded to their stored
dtype before codes are chosen, so the codes fit what is stored. One bit: scale = mean |w| is the optimum of that fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effllm.methods import Bipolar
from effllm.runtime.formats import bipolar
from effllm.runtime.formats.base import Packed

_CHUNK = 1 << 18  # weights at a time: temporaries stay in cache
_RATIOS: dict[int, tuple[float, ...]] = {
    1: (1.0,),
    2: (1.0, 0.85, 0.7, 0.55),
    3: (1.0, 0.9, 0.8, 0.7, 0.6),
    4: (1.0, 0.93, 0.86, 0.78),
    5: (1.0, 0.94, 0.88),
    6: (1.0, 0.95),
    7: (1.0,),
    8: (1.0,),
}
_WIDE = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6, 0.52, 0.44, 0.36)
_SWEEPS = {1: 1, 2: 4, 3: 3, 4: 2, 5: 2, 6: 1, 7: 1, 8: 0}
# At equal error the grid without a zero keeps a model better (Whisper tiny.en, 4 bits: KL 0.75 against 1.6), so the integer grid has
# to fit clearly better, as it does for weights that were shipped on one (Q4_0, Q8_0).
_INTEGER = 0.75
_SHIPPED = 4  # bits of the affine grids that weights are shipped on (Q4_1)
_GRID = {"none": "symmetric", "integer": "integer", "affine": "affine"}


@dataclass
class Fit:
    """Groups (R, g) on one grid: codes (R, g) uint8, scale and minimum (R,) in the stored dtype, squared error (R,) fp32."""

    codes: Tensor
    scale: Tensor
    minimum: Tensor | None
    error: Tensor


def scale_dtype(w: Tensor, bits: int) -> torch.dtype:
    """fp16, or fp32 where fp16 would overflow or lose its precision on more than a stray group."""
    top = w.abs().amax(-1)
    scale = top[top > 0] / (2**bits - 1)
    if scale.numel() == 0:
        return torch.float16
    tiny = (scale < 2.0**-17).float().mean()
    return torch.float32 if float(top.max()) > 3e4 or float(tiny) > 0.01 else torch.float16


def fit(x: Tensor, bits: int, grid: str, dtype: torch.dtype, weight: Tensor | None = None) -> Fit:
    """The best fit of groups x (R, g) fp32 on a grid; `weight` (R, g) >= 0 weighs the squared errors."""
    top = 2**bits - 1
    lo, hi = x.amin(-1), x.amax(-1)
    best: Fit | None = None
    wide = x.shape[-1] >= 128  # long groups have outliers far out: clip further and refine longer
    for ratio in _WIDE if wide and 1 < bits < 7 else _RATIOS[bits]:
        if grid == "affine":
            half = (hi - lo) * (ratio / 2)
            mid = (hi + lo) / 2
            start: tuple[Tensor, Tensor | None] = (half / top, mid - half)
        else:
            # the integer grid reaches one step further down than up
            reach = torch.maximum(hi, -lo) / top if grid == "symmetric" else torch.maximum(hi / max(top - 1, 1), -lo / (top + 1))
            start = (reach * ratio, None)
        best = _better(best, _code(x, *start, bits, grid, dtype, weight))
    assert best is not None
    if grid == "affine" and _SHIPPED < bits < 8:  # weights that were shipped on 16 levels lie on every finer grid of the same step
        best = _better(best, _code(x, (hi - lo) / (2 * (2**_SHIPPED - 1)), lo, bits, grid, dtype, weight))
    for _ in range(_SWEEPS[bits] * (3 if wide else 1)):
        best = _better(best, _code(x, *_least_squares(x, best.codes, bits, grid, weight), bits, grid, dtype, weight))
    return best


def _code(x: Tensor, scale: Tensor, minimum: Tensor | None, bits: int, grid: str, dtype: torch.dtype, weight: Tensor | None) -> Fit:
    top = 2**bits - 1
    s = scale.to(dtype)
    sf = s.float()
    step = 2 * sf.unsqueeze(-1)
    inverse = torch.where(sf > 0, 0.5 / sf, torch.zeros_like(sf)).unsqueeze(-1)
    if grid == "affine":
        assert minimum is not None
        low = minimum.to(dtype)
        base = low.float().unsqueeze(-1)
    else:
        low = None
        base = -step * bipolar.zero_point(bits, grid)
    u = ((x - base) * inverse).round_().clamp_(0, top)
    error = (u * step).add_(base).sub_(x).square_()
    error = error.sum(-1) if weight is None else (error * weight).sum(-1)
    return Fit(u.to(torch.uint8), s, low, error)


def _least_squares(x: Tensor, codes: Tensor, bits: int, grid: str, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    u = codes.float()
    if grid != "affine":
        v = u - bipolar.zero_point(bits, grid)
        vw = v if weight is None else v * weight
        return ((x * vw).sum(-1) / (v * vw).sum(-1).clamp_min(1e-12) / 2).clamp_min(0), None
    if weight is None:
        mean_u, mean_x = u.mean(-1, keepdim=True), x.mean(-1, keepdim=True)
    else:
        share = weight / weight.sum(-1, keepdim=True).clamp_min(1e-12)
        mean_u, mean_x = (u * share).sum(-1, keepdim=True), (x * share).sum(-1, keepdim=True)
    du = u - mean_u
    dw = du if weight is None else du * weight
    slope = ((x - mean_x) * dw).sum(-1) / (du * dw).sum(-1).clamp_min(1e-12)
    slope = slope.clamp_min(0)
    return slope / 2, mean_x.squeeze(-1) - slope * mean_u.squeeze(-1)


def _better(a: Fit | None, b: Fit) -> Fit:
    if a is None:
        return b
    take = b.error < a.error
    minimum = None if a.minimum is None or b.minimum is None else torch.where(take, b.minimum, a.minimum)
    codes = torch.where(take.unsqueeze(-1), b.codes, a.codes)
    return Fit(codes, torch.where(take, b.scale, a.scale), minimum, torch.where(take, b.error, a.error))


def grouped(w: Tensor, group: int) -> Tensor:
    """(N, K) to fp32 groups (N, G, g). A partial last group is filled with its last weight, which leaves its range as it is."""
    n, k = w.shape
    kp = bipolar.padded(k, group)
    x = w.float()
    if kp > k:
        x = torch.cat([x, x[:, -1:].expand(n, kp - k)], 1)
    return x.view(n, -1, group or kp)


def column_groups(weight: Tensor, group: int) -> Tensor:
    """Column weights (K,) as (G, g), normalized to mean 1; filled columns weigh nothing."""
    k = weight.shape[0]
    kp = bipolar.padded(k, group)
    full = torch.zeros(kp, dtype=torch.float32, device=weight.device)
    full[:k] = weight.float() / weight.float().mean().clamp_min(1e-38)
    return full.view(-1, group or kp)


def solve_grid(w: Tensor, params: Bipolar, grid: str, dtype: torch.dtype, weight: Tensor | None = None) -> tuple[Fit, float]:
    """All groups of w (N, K) on one grid, and the sum of their errors; `weight` (K,) weighs the columns."""
    n, k = w.shape
    g = params.group or bipolar.padded(k, 0)
    rows = max(1, _CHUNK // max(1, k))
    columns = None if weight is None else column_groups(weight, params.group)
    parts = []
    for i in range(0, n, rows):
        x = grouped(w[i : i + rows], params.group)
        each = None if columns is None else columns.expand_as(x).reshape(-1, g)
        parts.append(fit(x.reshape(-1, g), params.bits, grid, dtype, each))
    low = None if parts[0].minimum is None else torch.cat([p.minimum for p in parts if p.minimum is not None])
    joined = Fit(torch.cat([p.codes for p in parts]), torch.cat([p.scale for p in parts]), low, torch.cat([p.error for p in parts]))
    return joined, float(joined.error.double().sum())


def pays(affine_error: float, other_error: float, group: int, k: int, bits: int) -> bool:
    """Whether an offset per group is worth its 16 bits.

    Spread over the group's codes these bits would cut the squared error 4x each. What error costs in perplexity grows much faster
    than linearly at few bits (demo model at 3 bits: affine 50, symmetric 43,000), so the price is scaled by bits / 8.
    """
    return affine_error * 4.0 ** (16.0 / (group or k) * bits / 8) < other_error


def choose(w: Tensor, params: Bipolar, dtype: torch.dtype, weight: Tensor | None = None) -> str:
    """The grid for w (N, K): what the recipe names, or for "auto" the best one that pays for its bytes."""
    if params.offset != "auto":
        return _GRID[params.offset]
    n, k = w.shape
    grids = ["symmetric", "integer", "affine"] if params.bits > 1 else ["symmetric", "affine"]
    # which grid suits a matrix shows on a sample of its rows
    sample = w[:: max(1, n // 128)] if n > 256 else w
    errors = {g: solve_grid(sample, params, g, dtype, weight)[1] for g in grids}
    grid = "integer" if "integer" in errors and errors["integer"] < _INTEGER * errors["symmetric"] else "symmetric"
    return "affine" if pays(errors["affine"], errors[grid], params.group, k, params.bits) else grid


def search(w: Tensor, params: Bipolar) -> Packed:
    """Pack w (N, K). offset="auto" takes the better of the symmetric and integer grids, or the affine one where it pays."""
    (n, k), bits = w.shape, params.bits
    dtype = scale_dtype(grouped(w, params.group), bits)
    grid = choose(w, params, dtype)
    done, _ = solve_grid(w, params, grid, dtype)
    kp = bipolar.padded(k, params.group)
    codes = done.codes.view(n, kp)
    codes[:, k:] = 0
    low = None if done.minimum is None else done.minimum.view(n, -1)
    return bipolar.make(codes, done.scale.view(n, -1), low, k=k, bits=bits, group=params.group, grid=grid)
