"""The pivoted form: the same matrix in fewer numbers, with tame coefficients; ranks and budgets of both forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effllm.errors import WeightError
from effllm.solvers.lowrank.factors import Factors, break_even, check, numbers, others, rank_for
from effllm.solvers.lowrank.pivots import LIMIT, maxvol, pivoted
from effllm.solvers.lowrank.svd import svd


@pytest.mark.parametrize(("n", "k", "r"), [(12, 12, 1), (12, 12, 11), (40, 17, 16), (17, 40, 9), (64, 64, 50), (5, 1, 1)])
def test_same_matrix_in_fewer_numbers(n: int, k: int, r: int) -> None:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(n)).double()
    plain = svd(w, r)
    form = pivoted(plain)
    assert form.pivots is not None and form.rank == r
    torch.testing.assert_close(form.dense(), plain.dense(), rtol=1e-9, atol=1e-9)
    assert form.numbers == numbers(n, k, r, pivoted=True) == plain.numbers - r * r
    assert bool((form.pivots.diff() > 0).all())
    if n > r:
        assert float(form.a.abs().max()) <= LIMIT + 1e-9


def test_full_rank_of_a_wide_weight_is_exact() -> None:
    w = torch.randn(9, 20, generator=torch.Generator().manual_seed(0)).double()
    form = pivoted(svd(w, 9))
    assert form.a.shape == (0, 9)
    torch.testing.assert_close(form.dense(), w)


def test_dependent_directions_are_dropped() -> None:
    gen = torch.Generator().manual_seed(0)
    a, b = torch.randn(20, 4, generator=gen).double(), torch.randn(4, 30, generator=gen).double()
    twice = Factors((20, 30), torch.cat([a, a], 1), torch.cat([b, b], 0))
    form = pivoted(twice)
    assert form.rank == 4
    torch.testing.assert_close(form.dense(), twice.dense())


def test_maxvol_on_a_hard_start() -> None:
    """Rows that grow along the matrix: the first r are the worst choice."""
    u = torch.randn(200, 30, generator=torch.Generator().manual_seed(0)).double() * torch.logspace(-6, 0, 200).double()[:, None]
    rows, c = maxvol(u, 1.01)
    assert rows.unique().numel() == 30 and float(c.abs().max()) <= 1.01 + 1e-9
    torch.testing.assert_close(c @ u[rows], u)


@given(n=st.integers(1, 300), k=st.integers(1, 300), ratio=st.floats(0.01, 1.0), form=st.booleans())
@settings(max_examples=200, deadline=None)
def test_rank_for_is_the_largest_that_fits(n: int, k: int, ratio: float, form: bool) -> None:
    r = rank_for(n, k, ratio, pivoted=form)
    assert 1 <= r <= min(n, k)
    assert r == 1 or numbers(n, k, r, pivoted=form) <= ratio * n * k * (1 + 1e-9)
    assert r == min(n, k) or numbers(n, k, r + 1, pivoted=form) > ratio * n * k


def test_break_even() -> None:
    # figures of the papers' models: 4096 x 4096, 4096 x 14336, 1024 x 4096
    assert [break_even(*s) for s in ((4096, 4096), (4096, 14336), (1024, 4096))] == [2048, 3186, 820]
    for n, k in ((7, 9), (576, 1536)):
        r = break_even(n, k)
        assert numbers(n, k, r, pivoted=False) >= n * k > numbers(n, k, r - 1, pivoted=False)
        assert numbers(n, k, min(n, k) - 1, pivoted=True) < n * k
    assert rank_for(4096, 4096, 0.8) == 1638 and rank_for(4096, 11008, 0.4) == 1194


def test_others() -> None:
    assert others(torch.tensor([1, 3]), 5).tolist() == [0, 2, 4]
    with pytest.raises(WeightError):
        check(torch.zeros(3, 3), 4)
