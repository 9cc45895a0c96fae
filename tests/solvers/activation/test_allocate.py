"""TEAL's path and R-Sparse's split: budgets, order, seeds, and that a low rank helps where weights decay."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from effllm.errors import RecipeError
from effllm.solvers.activation import across, measured, rsparse, teal

SIZES = {"small": 100, "large": 300, "frail": 200}


def harm(shares: Mapping[str, float]) -> float:
    weight = {"small": 1.0, "large": 2.0, "frail": 50.0}
    return sum(weight[n] * s**2 for n, s in shares.items())


def test_greedy_reaches_its_target_exactly_and_spares_the_frail() -> None:
    path = teal.greedy(SIZES, harm, 0.5, 0.05)
    assert path[-1].level == pytest.approx(0.5) and teal.level(path[-1].shares, SIZES) == pytest.approx(0.5)
    assert path[-1].shares["frail"] < 0.2 < path[-1].shares["small"]
    assert harm(path[-1].shares) < 0.3 * harm(dict.fromkeys(SIZES, 0.5))


def test_lazy_steps_are_the_greedy_ones() -> None:
    shares, total = dict.fromkeys(SIZES, 0.0), sum(SIZES.values())
    unit = 0.05 * total / 3
    while teal.level(shares, SIZES) < 0.3 - 1e-9:
        left = (0.3 - teal.level(shares, SIZES)) * total
        trials = [(harm(shares | {n: shares[n] + min(unit, left) / s}), n, min(unit, left) / s) for n, s in SIZES.items()]
        _, name, more = min(trials)
        shares[name] += more
    assert teal.greedy(SIZES, harm, 0.3, 0.05)[-1].shares == pytest.approx(shares)


def test_a_path_answers_for_smaller_targets() -> None:
    path = teal.greedy(SIZES, harm, 0.6, 0.05)
    for target in (0.0, 0.13, 0.4, 0.6):
        assert teal.level(teal.at(path, target), SIZES) == pytest.approx(target, abs=1e-9)
    errors = [harm(teal.at(path, t)) for t in (0.1, 0.2, 0.3, 0.4, 0.5)]
    assert errors == sorted(errors)


def test_no_projection_goes_beyond_the_top() -> None:
    shares = teal.greedy(SIZES, lambda s: s["frail"], 0.9, 0.1)[-1].shares
    assert max(shares.values()) <= teal.TOP


@pytest.mark.parametrize(("n", "k"), [(96, 80), (192, 576), (1536, 576)])  # grouped keys: n is not k
@pytest.mark.parametrize("alpha", [1.0, 0.95, 0.7])
def test_every_split_reads_the_same_number_of_weights(n: int, k: int, alpha: float) -> None:
    drop, rank = rsparse.split(n, k, 0.5, alpha)
    assert (1 - drop) * n * k + rank * (n + k) == pytest.approx(0.5 * n * k)
    assert (rank == 0) == (alpha == 1.0) and 0.5 <= drop <= 1


def decaying(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(64, 64, generator=g))
    v, _ = torch.linalg.qr(torch.randn(64, 64, generator=g))
    return (u * torch.logspace(0, -4, 64)) @ v.t(), torch.randn(512, 64, generator=g)


def test_a_low_rank_helps_where_singular_values_decay() -> None:
    w, x = decaying(0)
    errors = {}
    for alpha in (1.0, 0.5):
        drop, rank = rsparse.split(64, 64, 0.5, alpha)
        size = x.abs() * rsparse.norms(w)
        u, v = rsparse.factors(w, rank)
        errors[alpha] = rsparse.error(w, x, size > size.flatten().quantile(drop), u.float(), v.float())
    assert errors[0.5] < 0.6 * errors[1.0]


def test_full_rank_is_exact_for_any_threshold() -> None:
    w, x = decaying(1)
    for scale in (None, torch.rand(64) + 0.1):
        u, v = rsparse.factors(w, 64, scale)
        assert rsparse.error(w.double(), x.double(), x.abs() > 1.0, u, v) < 1e-20
    assert rsparse.error(w, x, x.abs() > -1, None, None) == 0


def test_scaled_factors_fit_inputs_of_that_size_better() -> None:
    w, x = decaying(2)
    size = torch.logspace(-1, 1, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    x = x * size
    none = torch.zeros_like(x, dtype=torch.bool)
    errors = []
    for scale in (None, size):
        u, v = rsparse.factors(w, 8, scale)
        errors.append(rsparse.error(w.double(), x.double(), none, u, v))
    assert errors[1] < errors[0]


def test_search_is_seeded_and_never_worse_than_its_start() -> None:
    best = {"a": 0.7, "b": 0.95, "c": 1.0}
    calls: list[dict[str, float]] = []

    def objective(trial: Mapping[str, float]) -> float:
        calls.append(dict(trial))
        return sum(abs(trial[n] - v) for n, v in best.items())

    start = dict.fromkeys(best, 0.8)
    first = rsparse.search(list(best), start, objective, budget=40, seed=3)
    assert len(calls) == 40
    assert first == rsparse.search(list(best), start, objective, budget=40, seed=3)
    assert first[1] < objective(start)
    assert rsparse.search(list(best), start, objective, budget=1, seed=3)[0] == start
    with pytest.raises(RecipeError, match="E-RCP-VALUE"):
        rsparse.search(list(best), start, objective, budget=0, seed=3)


def test_shares_of_blocks_have_the_targets_mean_and_one_slope() -> None:
    costs, sizes = {"a": 1.0, "b": 2.0, "c": 0.7, "d": 1.1}, {"a": 100, "b": 100, "c": 50, "d": 150}
    found = across.shares(costs, sizes, 0.5)
    assert sum(found[n] * sizes[n] for n in sizes) == pytest.approx(0.5 * 400, rel=1e-9)
    slopes = {n: costs[n] * math.exp(across.GROWTH * s) / sizes[n] for n, s in found.items()}
    assert max(slopes.values()) == pytest.approx(min(slopes.values()), rel=1e-6)  # no block is at an end of its span
    assert found["b"] < 0.5 < found["d"]


def test_shares_of_blocks_stay_in_their_span() -> None:
    costs, sizes = {"a": 1.0, "b": 1e3, "c": 0.0}, dict.fromkeys("abc", 10)
    found = across.shares(costs, sizes, 0.5)
    assert found["b"] == pytest.approx(0.3) and found["c"] == pytest.approx(0.7) and found["a"] == pytest.approx(0.5)
    high = across.shares(costs, sizes, 0.9)
    assert max(high.values()) <= 0.95 and sum(high.values()) == pytest.approx(2.7)
    assert across.shares(dict.fromkeys("abc", 0.0), sizes, 0.5) == dict.fromkeys("abc", 0.5)
    assert across.shares(costs, sizes, 0.0) == dict.fromkeys("abc", 0.0)


def test_growth_passes_through_what_was_measured() -> None:
    curve = measured.growth([0.25, 0.5, 0.75], [0.2, 1.0, 8.0], 0.5)
    assert len(curve) == 96 and curve[0] == 0 and curve == sorted(curve)
    assert [curve[k] for k in (25, 50, 75)] == pytest.approx([0.2, 1.0, 8.0])
    assert curve[10] == pytest.approx(0.2 * 0.4**3)  # a cube below
    assert curve[95] / curve[75] == pytest.approx(8 ** (0.2 / 0.25))  # the last exponential above


def test_measured_shares_cost_the_same_per_further_weight() -> None:
    levels = [0.25, 0.5, 0.75]
    curves = dict.fromkeys(SIZES, measured.growth(levels, [0.2, 1.0, 8.0], 0.5)) | {"frail": measured.growth(levels, [0.1, 1.0, 60.0], 0.5)}
    costs = {"small": 0.3, "large": 0.5, "frail": 1.0}
    shares = measured.shares(costs, curves, SIZES, 0.5)
    assert sum(SIZES[n] * s for n, s in shares.items()) == pytest.approx(0.5 * sum(SIZES.values()))

    def total(moved: Mapping[str, float]) -> float:
        return sum(costs[n] * float(np.interp(s * 100, range(96), curves[n])) for n, s in moved.items())

    best = total(shares)
    for a in SIZES:
        for b in SIZES:  # weights moved from one to another cost more, by steps that are larger than those of the search
            if a != b:
                assert total(shares | {a: shares[a] + 3 / SIZES[a], b: shares[b] - 3 / SIZES[b]}) > best
    assert best < total(dict.fromkeys(SIZES, 0.5))


def test_measured_shares_at_their_ends() -> None:
    curve = measured.growth([0.25, 0.5, 0.75], [0.2, 1.0, 8.0], 0.5)
    free = measured.shares({"a": 0.0, "b": 1.0}, {"a": curve, "b": curve}, {"a": 1, "b": 1}, 0.4)
    assert free["a"] == pytest.approx(0.8) and free["b"] == pytest.approx(0.0)  # one that costs nothing takes all
    same = {"a": curve, "b": curve}
    assert measured.shares({"a": 1.0, "b": 1.0}, same, {"a": 1, "b": 2}, 0.99) == pytest.approx({"a": measured.TOP, "b": measured.TOP})
    assert measured.shares({"a": 0.0, "b": 0.0}, same, {"a": 1, "b": 2}, 0.3) == {"a": 0.3, "b": 0.3}
