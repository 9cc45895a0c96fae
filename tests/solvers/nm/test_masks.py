"""Masks keep exactly n of m, ties and all; scores do what their papers say; the output target is the least-squares weight."""

from __future__ import annotations

import pytest
import torch

from effllm.errors import CalibrationError, EffllmError, RecipeError, WeightError
from effllm.solvers.moments import Moments, of_inputs
from effllm.solvers.nm.masks import check_mask, magnitude, masked, nm_mask, normalize, nowag, ratio_mask, target, wanda
from tests.solvers.nm.problems import layer, loss


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (4, 8), (6, 8), (8, 16), (4, 4)])
def test_exactly_n_of_m_even_with_ties(n: int, m: int) -> None:
    gen = torch.Generator().manual_seed(0)
    score = torch.randint(0, 3, (17, 48), generator=gen).float()  # many ties
    groups = nm_mask(score, n, m).view(17, -1, m)
    assert (groups.sum(-1) == n).all()
    lowest = torch.where(groups, score.view(17, -1, m), torch.inf).amin(-1)
    highest = torch.where(groups, -torch.inf, score.view(17, -1, m)).amax(-1)
    assert (lowest >= highest).all()
    assert (nm_mask(torch.zeros(3, 48), n, m).view(3, -1, m)[..., :n]).all()  # by position


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.98])
def test_ratio_masks_keep_their_count(ratio: float) -> None:
    score = torch.randint(0, 4, (8, 50), generator=torch.Generator().manual_seed(1)).float()
    assert (ratio_mask(score, ratio).sum(1) == round(50 * (1 - ratio))).all()
    assert ratio_mask(score, ratio, per="layer").sum() == round(400 * (1 - ratio))


def test_wanda_is_magnitude_where_inputs_are_alike() -> None:
    w, _, _ = layer()
    x = torch.randn(64, 64).sign()  # every channel has rms 1
    assert torch.equal(nm_mask(wanda(w, of_inputs(x)), 2, 4), nm_mask(magnitude(w), 2, 4))


def test_wanda_beats_magnitude_and_random() -> None:
    w, moments, x = layer()
    losses = [loss(w, masked(w, nm_mask(s, 2, 4)).weight, x) for s in (wanda(w, moments), magnitude(w), torch.rand(w.shape))]
    assert losses[0] < losses[1] < losses[2]


def test_wanda_score_is_the_paper_s_up_to_a_constant() -> None:
    w, moments, x = layer()
    expected = w.abs() * x.norm(dim=0)
    torch.testing.assert_close(wanda(w, moments) * len(x) ** 0.5, expected, rtol=1e-4, atol=0)


def test_normalization_is_undone() -> None:
    w, moments, _ = layer()
    bar, rows, columns = normalize(w)
    torch.testing.assert_close(rows[:, None] * bar * columns, w, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bar.norm(dim=1), torch.ones(len(w)), rtol=1e-5, atol=0)
    assert nowag(w, moments).shape == w.shape
    w[3], w[:, 5] = 0, 0
    assert torch.isfinite(normalize(w)[0]).all()


def test_target_is_the_dense_output_s_least_squares_weight() -> None:
    w, moments, x = layer(tokens=2048)
    assert torch.equal(target(w, moments), w)
    same = of_inputs(x, x)
    torch.testing.assert_close(target(w, same), w, rtol=1e-3, atol=1e-3)
    d = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3)) * x.std(0)
    new = target(w, of_inputs(x.double(), d.double()), damp=1e-9)
    expected = torch.linalg.lstsq(x.double(), (d @ w.t()).double()).solution.t()
    torch.testing.assert_close(new.double(), expected, rtol=1e-3, atol=1e-3)


BAD: list[tuple[str, type[EffllmError], object]] = [
    ("E-WGT-NM", WeightError, lambda: nm_mask(torch.ones(2, 6), 2, 4)),
    ("E-RCP-PATTERN", RecipeError, lambda: nm_mask(torch.ones(2, 8), 5, 4)),
    ("E-RCP-PATTERN", RecipeError, lambda: nm_mask(torch.ones(2, 8), 0, 4)),
    ("E-WGT-NAN", WeightError, lambda: nm_mask(torch.full((2, 8), torch.nan), 2, 4)),
    ("E-WGT-DIM", WeightError, lambda: nm_mask(torch.ones(8), 2, 4)),
    ("E-WGT-META", WeightError, lambda: nm_mask(torch.ones(2, 8, device="meta"), 2, 4)),
    ("E-RCP-RATIO", RecipeError, lambda: ratio_mask(torch.ones(2, 8), 1.0)),
    ("E-RCP-RATIO", RecipeError, lambda: ratio_mask(torch.ones(2, 8), 0.99)),
    ("E-RCP-RATIO", RecipeError, lambda: ratio_mask(torch.ones(2, 8), -0.1)),
    ("E-WGT-MASK", WeightError, lambda: masked(torch.ones(2, 8), torch.ones(2, 4, dtype=torch.bool))),
    ("E-WGT-MASK", WeightError, lambda: check_mask(torch.ones(2, 8, dtype=torch.bool), (2, 8), 2, 4)),
    ("E-WGT-MASK", WeightError, lambda: check_mask(torch.zeros(3, 8, dtype=torch.bool), (2, 8), 2, 4)),
    ("E-CAL-UNSEEN", CalibrationError, lambda: wanda(torch.ones(2, 8), Moments(torch.zeros(8, 8), torch.zeros(8), torch.zeros(8), 0))),
    ("E-CAL-HESSIAN", CalibrationError, lambda: wanda(torch.ones(2, 4), Moments(torch.zeros(8, 8), torch.zeros(8), torch.zeros(8), 1))),
]


@pytest.mark.parametrize(("code", "kind", "call"), BAD, ids=[f"{i}-{c}" for i, (c, _, _) in enumerate(BAD)])
def test_bad_input_is_named(code: str, kind: type[EffllmError], call: object) -> None:
    assert callable(call)
    with pytest.raises(kind) as caught:
        call()
    assert caught.value.code == code
