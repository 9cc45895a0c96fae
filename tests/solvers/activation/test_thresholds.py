"""Histograms and thresholds against exact quantiles; CHESS's identities; what cannot be thresholded."""

from __future__ import annotations

import math

import pytest
import torch

from effllm.errors import CalibrationError
from effllm.solvers.activation import Histogram, thresholds
from effllm.solvers.activation.histogram import BINS, edges


def seen(x: torch.Tensor) -> Histogram:
    found = Histogram()
    for part in x.split(1000):  # streamed
        found.add(part)
    return found


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_quantiles_are_those_of_the_numbers(scale: float, share: float) -> None:
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(0)) * scale
    t = seen(x).quantile(share)
    # a bin is 1/128 of its lower edge wide at most; within it the count is that of the numbers
    assert t == pytest.approx(float(x.abs().quantile(share)), rel=1 / 128)
    assert float((x.abs() <= t).float().mean()) == pytest.approx(share, abs=1e-3)
    assert seen(x).share(t) == pytest.approx(share, abs=1e-4)


def test_a_magnitude_falls_below_the_upper_edge_of_its_bin() -> None:
    for value in (2.0**-19, 1.0, 3.7, 100.0):
        counts = seen(torch.tensor([value, -value])).counts
        at = int(counts.nonzero()[0, 0])
        assert int(counts[at]) == 2 and edges()[at - 1] <= value < edges()[at]


def test_ends_of_the_range_share_a_bin() -> None:
    counts = seen(torch.tensor([0.0, 1e-30, 1e30])).counts
    assert int(counts[0]) == 2 and int(counts[BINS - 1]) == 1


def test_skewed_activations_get_the_share_that_was_asked_for() -> None:
    # the inverse distribution of a symmetric model is biased here: 50 % asked, 75 % dropped
    x = torch.distributions.Gamma(0.3, 1.0).sample((20_000,))
    t = thresholds.scalar(seen(x), 0.5)
    assert float((x <= t).float().mean()) == pytest.approx(0.5, abs=0.01)


def test_exact_zeros_are_a_share_of_their_own() -> None:
    x = torch.cat([torch.zeros(700), torch.rand(300) + 0.1])
    assert thresholds.scalar(seen(x), 0.5) == 0.0
    assert seen(x).share(0.0) == pytest.approx(0.7)


def test_nothing_is_below_the_threshold_of_sparsity_0() -> None:
    assert thresholds.scalar(seen(torch.zeros(10)), 0) == -1.0


def test_constant_activations_are_refused() -> None:
    with pytest.raises(CalibrationError, match="E-CAL-CONSTANT"):
        thresholds.scalar(seen(torch.full((5000,), 0.7)), 0.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_are_refused(bad: float) -> None:
    with pytest.raises(CalibrationError, match="E-CAL-NAN"):
        seen(torch.tensor([1.0, bad]))


def test_nothing_seen_is_refused() -> None:
    with pytest.raises(CalibrationError, match="E-CAL-UNSEEN"):
        Histogram().quantile(0.5)


def heterogeneous() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    scale = torch.logspace(-1, 1, 64)
    return torch.randn(4096, 64, generator=g), torch.randn(4096, 64, generator=g) * scale, scale


def test_chess_removes_less_energy_than_cats_at_the_same_sparsity() -> None:
    gate, up, _ = heterogeneous()
    c = thresholds.channel_scale(up.double().square().sum(0), len(up))
    theta = thresholds.scalar(seen(gate * c), 0.5)
    chess = gate.abs() <= thresholds.per_channel(c, theta)
    cats = gate.abs() <= thresholds.scalar(seen(gate), 0.5)
    oracle = (gate * up).abs() <= (gate * up).abs().flatten().quantile(0.5)
    assert [float(m.float().mean()) for m in (chess, cats, oracle)] == pytest.approx([0.5] * 3, abs=0.01)
    lost = [float((gate * up)[m].square().sum()) for m in (oracle, chess, cats)]
    assert lost[0] < lost[1] < 0.3 * lost[2]


def test_chess_with_equal_channels_is_cats() -> None:
    gate, _, _ = heterogeneous()
    c = torch.full((64,), 2.5)
    t = thresholds.per_channel(c, thresholds.scalar(seen(gate * 2.5), 0.5))
    assert torch.allclose(t, torch.full((64,), thresholds.scalar(seen(gate), 0.5)), rtol=1 / 64)


def test_a_channel_that_never_counts_is_always_dropped() -> None:
    t = thresholds.per_channel(torch.tensor([0.0, 1.0]), 0.3)
    assert t.tolist() == [math.inf, pytest.approx(0.3)]
    assert thresholds.per_channel(torch.tensor([0.0, 1.0]), -1.0).tolist() == [-1.0, -1.0]
    assert thresholds.per_channel(torch.zeros(1), 0.0).tolist() == [math.inf]  # 0 / 0 is no NaN
