"""DSnoT against a plain row-by-row reading of its rules, and what it promises: never a larger |eps|, never another pattern."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from effllm.errors import CalibrationError, WeightError
from effllm.solvers.moments import Moments, of_inputs
from effllm.solvers.nm import dsnot, nm_mask, ratio_mask, wanda
from effllm.solvers.nm.dsnot import expectation, refine
from effllm.solvers.nm.masks import magnitude
from tests.solvers.nm.problems import layer, loss

PATTERNS = [(2, 4), (4, 8), (6, 8), None]


def start(w: Tensor, moments: Moments, pattern: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    score = wanda(w, moments)
    return (ratio_mask(score, 0.5) if pattern is None else nm_mask(score, *pattern)), score


def one_row(gain: Tensor, variance: Tensor, keep: Tensor, score: Tensor, m: int | None, bound: float, cycles: int) -> tuple[Tensor, list[float]]:
    """The rules for one row in plain loops; returns the mask with the smallest |eps| and all |eps|."""
    keep = keep.clone()
    eps = float(gain[~keep].sum())
    sign, spent = (eps > 0) - (eps < 0), set[int]()
    best, seen = keep.clone(), [abs(eps)]
    for _ in range(cycles):
        if abs(eps) <= bound:
            break
        side = 1 if eps > 0 else -1
        candidates = [j for j in range(len(gain)) if not keep[j] and j not in spent and float(gain[j]) * side > 0]
        if not candidates:
            break
        grow = max(candidates, key=lambda j: float(gain[j] / variance[j]) * side)
        if m is None:
            partners = [j for j in range(len(gain)) if keep[j] and j not in spent and float(gain[j]) * side < 0]
            if not partners:
                break
        else:
            partners = [j for j in range(grow // m * m, grow // m * m + m) if keep[j] and j not in spent]
        spent.add(grow)
        if not partners:
            continue
        lose = min(partners, key=lambda j: float(score[j]))
        new = eps + float(gain[lose]) - float(gain[grow])
        if new * sign <= 0:
            break
        keep[grow], keep[lose], eps = True, False, new
        spent.add(lose)
        if abs(eps) < min(seen):
            best = keep.clone()
        seen.append(abs(eps))
    return best, seen


@pytest.mark.parametrize("pattern", PATTERNS)
def test_follows_the_rules(pattern: tuple[int, int] | None) -> None:
    w, moments, _ = layer(n=24)
    mask, score = start(w, moments, pattern)
    gain, variance = expectation(w.double(), moments)
    bound = torch.full((len(w),), 1e-3, dtype=torch.float64)
    got = refine(gain, variance, mask, score.double(), pattern, 50, bound, 1.0, True)
    for i in range(len(w)):
        want, seen = one_row(gain[i], variance, mask[i], score[i].double(), pattern[1] if pattern else None, 1e-3, 50)
        assert torch.equal(got[i], want)
        if pattern is None:
            assert all(b <= a for a, b in itertools.pairwise(seen))
    assert not torch.equal(got, mask)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("same_sign", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_never_worse_and_same_pattern(pattern: tuple[int, int] | None, same_sign: bool, seed: int) -> None:
    w, moments, x = layer(seed=seed, mean=1.0)
    mask, score = start(w, moments, pattern)
    gain, _ = expectation(w.double(), moments)
    new = dsnot(w, moments, mask, score, pattern=pattern, same_sign=same_sign, guard=False)
    before, after = ((gain * ~k).sum(1).abs() for k in (mask, new))
    assert (after <= before).all() and after.sum() < 0.7 * before.sum()
    assert torch.equal(new.sum(1), mask.sum(1))
    if pattern is not None:
        assert (new.view(len(w), -1, pattern[1]).sum(-1) == pattern[0]).all()
    held = dsnot(w, moments, mask, score, pattern=pattern, same_sign=same_sign)
    assert loss(w, w * held, x) <= loss(w, w * mask, x)
    assert ((gain * ~held).sum(1).abs() <= before).all()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_zero_mean_changes_nothing(pattern: tuple[int, int] | None) -> None:
    w, _, x = layer()
    moments = of_inputs(torch.cat([x, -x]))
    moments.total.zero_()
    mask, score = start(w, moments, pattern)
    assert torch.equal(dsnot(w, moments, mask, score, pattern=pattern), mask)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_scale_of_inputs_and_weights_and_tokens_is_irrelevant(pattern: tuple[int, int] | None) -> None:
    w, moments, x = layer()
    mask, score = start(w, moments, pattern)
    plain = dsnot(w, moments, mask, score, pattern=pattern, tolerance=0.01)
    large = dsnot(w * 1024, of_inputs(x * 64), mask, score, pattern=pattern, tolerance=0.01)
    twice = dsnot(w, of_inputs(torch.cat([x, x]).double()), mask, score, pattern=pattern, tolerance=0.01)
    assert torch.equal(plain, large) and float((plain == twice).float().mean()) > 0.99


@pytest.mark.parametrize("pattern", PATTERNS)
def test_inputs_that_never_vary(pattern: tuple[int, int] | None) -> None:
    w, _, x = layer()
    x[:, 3], x[:, 10:20] = 2.0, 0.0
    moments = of_inputs(x)
    mask, score = start(w, moments, pattern)
    new = dsnot(w, moments, mask, score, pattern=pattern)
    assert torch.equal(new.sum(1), mask.sum(1))
    constant = of_inputs(torch.ones(8, 64))
    mask, score = start(w, constant, pattern)
    assert torch.equal(dsnot(w, constant, mask, score, pattern=pattern).sum(1), mask.sum(1))


def test_kept_weights_are_never_grown() -> None:
    # every pruned weight pulls the same way: once they are used up, zeros of kept weights must not be taken
    w = torch.tensor([[3.0, -1.0, 2.5, -1.5, 0.5, -0.4, 0.3, 0.2]])
    moments = of_inputs(torch.ones(4, 8) + 0.01 * torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))
    mask = nm_mask(magnitude(w), 2, 4)
    new = dsnot(w, moments, mask, magnitude(w), pattern=(2, 4), guard=False)
    assert (new.view(1, 2, 4).sum(-1) == 2).all()


def test_bad_input_is_named() -> None:
    w, moments, _ = layer()
    mask, score = start(w, moments, (2, 4))
    with pytest.raises(WeightError, match="E-WGT-MASK"):
        dsnot(w, moments, mask[:, :32], score, pattern=(2, 4))
    with pytest.raises(WeightError, match="E-WGT-MASK"):
        dsnot(w, moments, torch.ones_like(mask), score, pattern=(2, 4))
    with pytest.raises(WeightError, match="E-WGT-MASK"):
        dsnot(w, moments, mask, score[:4])
    with pytest.raises(CalibrationError, match="E-CAL-UNSEEN"):
        dsnot(w, Moments(torch.zeros(64, 64), torch.zeros(64), torch.zeros(64), 0), mask, score)
