"""DSnoT (arXiv 2310.08915): move a mask, not the weights, until the expected error of every output is small.

With m_j = w_j * mean(x_j), a row's expected output error is eps = sum of m over its pruned weights. A cycle grows back the pruned
weight whose m / Var(x)^p takes most off eps, and prunes another one for it: with a pattern the kept weight of the same group with the
lowest initial score, without one the lowest of those whose m pulls eps towards zero. A row stops when |eps| is small, when its
candidates are used up, or when the next step would change the sign of eps. Rows run in parallel.

Where this differs from the published code: means are per token and the threshold is relative to the row's output spread, so that
neither window length nor a layer's scale matters; candidates are taken from the pruned weights only (a list that holds zeros for kept
ones hands those out when candidates of a sign run out); inputs that never vary do not divide by zero; each row keeps the best mask that
it saw, because with a pattern a step may raise |eps|; and, with `guard`, a row keeps its start where the whole error, not its mean,
would grow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.errors import CalibrationError, WeightError
from effllm.solvers.moments import Moments
from effllm.solvers.nm.masks import check_mask, check_weight, masked, row_loss

CYCLES = 50
TOLERANCE = 0.1 / 2048  # the published 0.1 is on sums over windows of 2048 tokens


def dsnot(
    w: Tensor,
    moments: Moments,
    mask: Tensor,
    score: Tensor,
    *,
    pattern: tuple[int, int] | None = None,
    cycles: int = CYCLES,
    tolerance: float = TOLERANCE,
    power: float = 1.0,
    same_sign: bool = True,
    guard: bool = True,
) -> Tensor:
    """A better mask (N, K) bool for w (N, K), with as many weights per row (and per group of `pattern` = (n, m)) as `mask`.

    score (N, K) is the one that chose `mask` (Wanda's, say). same_sign matters without a pattern only: with one it always holds.
    Raises WeightError (E-WGT-MASK), CalibrationError (E-CAL-HESSIAN).
    """
    check_weight(w)
    moments.check(w.shape[1])
    if pattern is not None:
        check_mask(mask, w.shape, *pattern)
    if mask.shape != w.shape or score.shape != w.shape:
        cause = f"mask {tuple(mask.shape)} and score {tuple(score.shape)} for a weight {tuple(w.shape)}"
        raise WeightError("E-WGT-MASK", cause, "make both from this weight")
    if moments.count < 1:
        raise CalibrationError("E-CAL-UNSEEN", "the statistics hold no input", "collect them on this layer's inputs")
    w64 = w.detach().double()
    gain, variance = expectation(w64, moments)
    keep = refine(gain, variance, mask, score.double(), pattern, cycles, tolerance * _spread(w64, variance), power, same_sign)
    if guard:
        h = moments.hessian.to(w.device)
        worse = row_loss(w64, masked(w64, keep).weight, h) > row_loss(w64, masked(w64, mask).weight, h)
        keep = torch.where(worse[:, None], mask, keep)
    return keep


def expectation(w: Tensor, moments: Moments) -> tuple[Tensor, Tensor]:
    """(w_j mean(x_j) (N, K), Var(x_j) (K,)) in the dtype of w."""
    mean = moments.mean.to(w)
    second = moments.hessian.diagonal().to(w) / moments.count
    return w * mean, (second - mean**2).clamp_min(0)


def _spread(w: Tensor, variance: Tensor) -> Tensor:
    """Standard deviation (N,) of the outputs, were inputs independent."""
    return (w**2 @ variance).sqrt()


def refine(
    gain: Tensor,
    variance: Tensor,
    mask: Tensor,
    score: Tensor,
    pattern: tuple[int, int] | None,
    cycles: int,
    threshold: Tensor,
    power: float,
    same_sign: bool,
) -> Tensor:
    """The cycles: gain (N, K) = w * mean(x), variance (K,), threshold (N,); everything fp64."""
    keep, spent = mask.clone(), torch.zeros_like(mask)
    eps = (gain * ~keep).sum(1)
    first = eps.sign()
    live = eps.abs() > threshold
    best, lowest = keep.clone(), eps.abs()
    floor = variance[variance > 0].amin() if bool((variance > 0).any()) else torch.ones((), dtype=gain.dtype, device=gain.device)
    key = gain / variance.clamp_min(floor) ** power
    rows = torch.arange(len(gain), device=gain.device)
    never = torch.full((), -torch.inf, dtype=gain.dtype, device=gain.device)
    m = pattern[1] if pattern is not None else gain.shape[1]
    for _ in range(cycles):
        if not bool(live.any()):
            break
        side = eps.sign()[:, None]
        grow_from = torch.where(~keep & ~spent & (gain.sign() == side), key * side, never)
        most, grow = grow_from.max(1)
        live &= most > never
        free = keep & ~spent
        if pattern is None:
            free &= gain.sign() == -side
            lose = torch.where(free, -score, never).argmax(1)
            found = free[rows, lose]
        else:
            start = grow // m * m
            inside = start[:, None] + torch.arange(m, device=gain.device)
            pick = torch.where(free.gather(1, inside), -score.gather(1, inside), never).argmax(1)
            lose = start + pick
            found = free[rows, lose]
        if pattern is None:
            live &= found  # no partner in the whole row
        new = eps + gain[rows, lose] - gain[rows, grow]
        if same_sign or pattern is not None:
            live &= ~found | (new.sign() == first)
        move = live & found
        r, g, p = rows[move], grow[move], lose[move]
        keep[r, g], keep[r, p] = True, False
        spent[rows[live], grow[live]] = True  # a candidate without a partner in its group is passed over
        spent[r, p] = True
        eps = torch.where(move, new, eps)
        better = move & (eps.abs() < lowest)
        best, lowest = torch.where(better[:, None], keep, best), torch.where(better, eps.abs(), lowest)
        live &= eps.abs() > threshold
    return best
