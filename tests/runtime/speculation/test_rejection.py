"""Recursive rejection sampling is exact: by enumeration of everything that can be drawn, without a random number."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from effllm.runtime.speculation import rejection
from tests.runtime.speculation.chi import LIMIT, deviation


def distribution(seed: int, size: int = 5, zeros: tuple[int, ...] = ()) -> Tensor:
    p = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(1.5).exp()
    p[list(zeros)] = 0
    return p / p.sum()


def total(q: Tensor, p: Tensor, count: int, outcome: Callable[[Tensor, Tensor, tuple[int, ...]], Tensor]) -> Tensor:
    """The distribution of the result over all ordered draws of `count` siblings without replacement."""
    out = torch.zeros_like(q)
    for siblings in itertools.permutations([i for i in range(len(p)) if p[i] > 0], count):
        chance, rest = 1.0, p
        for token in siblings:
            chance *= float(rest[token])
            rest = rejection.without(rest, token)
        out += chance * outcome(q, p, siblings)
    return out


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize(("q", "p"), [(1, 2), (3, 4), (5, 5)])
def test_the_result_is_the_target(q: int, p: int, count: int) -> None:
    target, draft = distribution(q), distribution(p)
    assert torch.allclose(total(target, draft, count, rejection.outcome), target, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("target_zeros", "draft_zeros"), [((0, 1, 2), (3, 4)), ((0, 1), (1, 4)), ((), (2, 3)), ((2, 3), ())])
def test_with_zeros_and_disjoint_supports(target_zeros: tuple[int, ...], draft_zeros: tuple[int, ...], count: int) -> None:
    target, draft = distribution(1, zeros=target_zeros), distribution(2, zeros=draft_zeros)
    assert torch.allclose(total(target, draft, count, rejection.outcome), target, atol=1e-12)


def test_the_whole_vocabulary_as_siblings_and_equal_distributions() -> None:
    p = distribution(7)
    for siblings in itertools.permutations(range(5)):
        assert rejection.recursive(p, p, siblings, lambda: 1 - 1e-12)[0] == 0  # p = q: the first is always accepted
    assert torch.allclose(total(distribution(8), p, 5, rejection.outcome), distribution(8), atol=1e-12)


def test_siblings_judged_by_the_first_distribution_would_bias_it() -> None:
    """The mistake that the rule's p^k is there against; the enumeration sees it."""

    def wrong(q: Tensor, p: Tensor, siblings: tuple[int, ...]) -> Tensor:
        out, reach = torch.zeros_like(q), 1.0
        for token in siblings:
            a = rejection.acceptance(q, p, token)
            out[token] += reach * a
            reach *= 1 - a
            q = rejection.residual(q, p)
        return out + reach * q

    target, draft = distribution(1), distribution(2)
    assert float((total(target, draft, 2, wrong) - target).abs().max()) > 1e-2


def test_more_siblings_are_accepted_more_often() -> None:
    q, p = distribution(1), distribution(2)

    def accepted(count: int) -> float:
        chance = 0.0
        for siblings in itertools.permutations(range(5), count):
            way, rest, reach, left = 1.0, p, 1.0, q
            for token in siblings:
                way *= float(rest[token])
                reach *= 1 - rejection.acceptance(left, rest, token)
                left, rest = rejection.residual(left, rest), rejection.without(rest, token)
            chance += way * (1 - reach)
        return chance

    rates = [accepted(k) for k in (1, 2, 3, 4)]
    assert rates == sorted(rates) and rates[0] == pytest.approx(float(torch.minimum(p, q).sum())) and rates[1] > rates[0] + 0.02


def test_the_sampler_follows_its_enumeration() -> None:
    q, p, siblings = distribution(1), distribution(2), (4, 0)
    stream = torch.Generator().manual_seed(0)
    counts = torch.zeros(5)
    for _ in range(4000):
        found, left = rejection.recursive(q, p, siblings, lambda: float(torch.rand((), generator=stream)))
        counts[siblings[found] if found is not None else int(torch.multinomial(left, 1, generator=stream))] += 1
    assert deviation(counts, rejection.outcome(q, p, siblings)) < LIMIT
    assert deviation(counts, p) > LIMIT


def test_nothing_left_and_nothing_drafted() -> None:
    q = distribution(3)
    assert torch.equal(rejection.residual(q, q), q)  # only rounding gets here
    sure = torch.tensor([0.0, 1.0, 0.0])
    assert rejection.without(sure, 1).sum() == 0
    assert rejection.acceptance(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0]), 0) == 1.0
    assert rejection.acceptance(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]), 0) == 0.0
