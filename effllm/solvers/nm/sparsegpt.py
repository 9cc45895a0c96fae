"""SparseGPT (arXiv 2301.00774): prune columns left to right and let the later ones make up for what each loses.

With U^T U = H^-1 (U upper triangular), dropping w_j costs w_j^2 / U_jj^2, and the best change of the later columns is
-(w_j / U_jj) U[j, j:]. A group's mask is chosen when its first column is reached (without a pattern: a block's, when its first column
is), so it sees what earlier columns have moved into it. Columns that no input reached are dropped first.

Sorted by importance, groups that carry most go first, while there are most columns left to make up for them.

Joint with quantization, the survivors of the sweep are quantized by a second sweep with the same H: scales are searched on the updated
survivors, packed together as a format stores them, and what pruning and rounding lose is carried to the later survivors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from effllm.errors import RecipeError
from effllm.recipe import Bipolar
from effllm.runtime.formats import bipolar
from effllm.runtime.formats.base import Packed
from effllm.solvers.gptq import DAMP, damped, inverse_factor
from effllm.solvers.moments import Moments
from effllm.solvers.nm.masks import Pruned, check_mask, check_pattern, check_weight, kept
from effllm.solvers.search import choose, fit, grouped, scale_dtype

_BLOCK = 128


@dataclass
class Quantized(Pruned):
    """`values` is a bipolar weight (N, K n / m) of the survivors of each row, in order; `weight` holds its exact values in place."""

    values: Packed


def sparsegpt(w: Tensor, moments: Moments, n: int, m: int, *, damp: float = DAMP, sort: bool = False, mask: Tensor | None = None) -> Pruned:
    """n of every m inputs of w (N, K) stay, updated in the metric of `moments.hessian`; fp32.

    `mask` gives the pattern, and only values are solved for. Raises WeightError (E-WGT-NM, E-WGT-MASK), CalibrationError (E-CAL-HESSIAN).
    """
    check_pattern(n, m)
    check_weight(w, m)
    moments.check(w.shape[1])
    if mask is not None:
        check_mask(mask, w.shape, n, m)
    order = _order(moments.hessian, m, sort).to(w.device)
    left, u = _start(w, moments, damp, order)
    rows = w.shape[0]
    keep = torch.zeros_like(left, dtype=torch.bool) if mask is None else mask.t()[order].contiguous()

    def choose_group(j: int) -> None:
        if mask is None and j % m == 0:
            score = (left[j : j + m] / u.diagonal()[j : j + m, None]).abs().t()
            best = score.sort(dim=-1, descending=True, stable=True).indices[:, :n]
            keep[j : j + m] = torch.zeros(rows, m, dtype=torch.bool, device=w.device).scatter_(1, best, True).t()

    def value(j: int) -> Tensor:
        choose_group(j)
        return left[j] * keep[j]

    _sweep(left, u, value, -(-_BLOCK // m) * m)
    back = torch.argsort(order)
    return Pruned(left[back].t().contiguous(), keep[back].t().contiguous())


def sparsegpt_ratio(w: Tensor, moments: Moments, ratio: float, *, damp: float = DAMP) -> Pruned:
    """Without a pattern: `ratio` of the weights of every block of 128 columns go. RecipeError (E-RCP-RATIO), CalibrationError."""
    check_weight(w)
    moments.check(w.shape[1])
    k = w.shape[1]
    left, u = _start(w, moments, damp, torch.arange(k, device=w.device))
    keep = torch.zeros_like(left, dtype=torch.bool)

    def value(j: int) -> Tensor:
        if j % _BLOCK == 0:
            part = slice(j, min(j + _BLOCK, k))
            score = (left[part] / u.diagonal()[part, None]).abs().flatten()
            best = score.sort(dim=0, descending=True, stable=True).indices[: kept(len(score), ratio)]
            keep[part] = torch.zeros_like(score, dtype=torch.bool).scatter_(0, best, True).view_as(left[part])
        return left[j] * keep[j]

    _sweep(left, u, value, _BLOCK)
    return Pruned(left.t().contiguous(), keep.t().contiguous())


def sparsegpt_quantized(w: Tensor, moments: Moments, n: int, m: int, params: Bipolar, *, damp: float = DAMP, sort: bool = False) -> Quantized:
    """Prune, then quantize the survivors by the same H; the grid and its groups lie on the survivors, n K / m to a row."""
    pruned = sparsegpt(w, moments, n, m, damp=damp, sort=sort)
    rows, k = w.shape
    if (k // m * n) % 8:
        raise RecipeError("E-RCP-PATTERN", f"{n}:{m} keeps {k // m * n} of {k} weights a row, no multiple of 8", "choose another pattern")
    at = pruned.mask.nonzero()[:, 1].view(rows, -1)  # columns of the survivors of each row
    values = pruned.weight.gather(1, at)
    h = damped(moments.hessian.to(w.device), k, damp)
    weight = h.diagonal().float()[at]
    x, share = grouped(values, params.group), grouped(weight, params.group)
    dtype = scale_dtype(x, params.bits)
    grid = choose(values, params, dtype, weight.mean(0))
    found = fit(x.reshape(-1, x.shape[-1]), params.bits, grid, dtype, share.reshape(-1, x.shape[-1]))
    scale = found.scale.view(rows, -1)
    low = None if found.minimum is None else found.minimum.view(rows, -1)

    order = _order(moments.hessian, m, sort).to(w.device)
    left, u = _start(w, moments, damp, order)
    width = params.group or values.shape[1]
    group = ((pruned.mask.cumsum(1) - 1).clamp_min(0) // width).t()[order]
    keep = pruned.mask.t()[order]
    step = 2 * scale.float()
    base = -step * bipolar.zero_point(params.bits, grid) if low is None else low.float()
    inverse = torch.where(step > 0, 1 / step, torch.zeros_like(step))
    codes = torch.zeros_like(left)

    def value(j: int) -> Tensor:
        g = group[j][:, None]
        b, s = base.gather(1, g)[:, 0], step.gather(1, g)[:, 0]
        codes[j] = ((left[j] - b) * inverse.gather(1, g)[:, 0]).round_().clamp_(0, 2**params.bits - 1)
        return (codes[j] * s + b) * keep[j]

    _sweep(left, u, value, -(-_BLOCK // m) * m)
    back = torch.argsort(order)
    kp = bipolar.padded(values.shape[1], params.group)
    full = torch.zeros(rows, kp, dtype=torch.uint8, device=w.device)
    full[:, : values.shape[1]] = codes[back].t().gather(1, at).to(torch.uint8)
    packed = bipolar.make(full, scale, low, k=values.shape[1], bits=params.bits, group=params.group, grid=grid)
    return Quantized(torch.zeros(rows, k, device=w.device).scatter_(1, at, bipolar.unpack(packed)), pruned.mask, packed)


def _order(hessian: Tensor, m: int, sort: bool) -> Tensor:
    """Columns in the order of the sweep; groups stay whole."""
    k = hessian.shape[0]
    if not sort:
        return torch.arange(k)
    carried = hessian.diagonal().view(-1, m).sum(1)
    groups = torch.argsort(carried, descending=True, stable=True)
    return (groups[:, None] * m + torch.arange(m, device=groups.device)).flatten()


def _start(w: Tensor, moments: Moments, damp: float, order: Tensor) -> tuple[Tensor, Tensor]:
    """(w^T (K, N) fp32 with dead columns at zero, U (K, K) fp32), columns in the given order."""
    h = moments.hessian.to(w.device)
    left = w.detach().float().t()[order].contiguous()
    left[h.diagonal()[order] == 0] = 0
    h = damped(h, w.shape[1], damp)[order][:, order]
    return left, inverse_factor(h).float()


def _sweep(left: Tensor, u: Tensor, value: Callable[[int], Tensor], block: int) -> None:
    """Replace row j of left (K, N) by value(j), and carry the error to the later rows, lazily by blocks."""
    k = left.shape[0]
    for a in range(0, k, block):
        b = min(a + block, k)
        lost = torch.empty(b - a, left.shape[1], dtype=left.dtype, device=left.device)
        for j in range(a, b):
            new = value(j)
            lost[j - a] = (left[j] - new) / u[j, j]
            left[j] = new
            if j + 1 < b:
                left[j + 1 : b].addr_(u[j, j + 1 : b], lost[j - a], alpha=-1)
        if b < k:
            left[b:].addmm_(u[a:b, b:].t(), lost, alpha=-1)
