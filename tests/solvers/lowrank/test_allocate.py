"""Rank allocation: budgets are met and used, monotone, optimal against brute force, and says why a layer stays dense."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from effllm.errors import RecipeError
from effllm.solvers.lowrank.allocate import Choice, energy, optimal, sensitivity, stored, summary, uniform, welore
from effllm.solvers.lowrank.factors import break_even, numbers, rank_for

SHAPES = {"a.q": (48, 48), "a.up": (96, 48), "b.q": (48, 48), "b.down": (48, 96)}


def spectra() -> dict[str, torch.Tensor]:
    flat = torch.linspace(1.0, 0.8, 48).double()
    steep = {"a.q": -3, "b.q": -1, "b.down": -2}
    return {"a.up": flat * 2} | {name: torch.logspace(0, end, 48).double() for name, end in steep.items()}


@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8, 0.95])
def test_budgets_are_met_and_used(ratio: float, pivoted: bool) -> None:
    for found in (uniform(SHAPES, ratio, pivoted=pivoted), energy(spectra(), SHAPES, ratio, pivoted=pivoted)):
        assert found.ratio == pytest.approx(stored(SHAPES, found.ranks, pivoted=pivoted))
        assert ratio - 0.04 < found.ratio <= ratio + 1e-9
        for name, rank in found.ranks.items():
            assert (rank is None) == (name in found.reasons)
            assert rank is None or numbers(*SHAPES[name], rank, pivoted=pivoted) < math.prod(SHAPES[name])


def test_neutral_ratio_keeps_everything() -> None:
    for found in (uniform(SHAPES, 1.0), energy(spectra(), SHAPES, 1.0), uniform(SHAPES, 1.0, pivoted=True)):
        assert set(found.ranks.values()) == {None} and found.ratio == 1.0 and set(found.reasons) == set(SHAPES)
    assert str(break_even(48, 48)) in uniform(SHAPES, 1.0).reasons["a.q"]


def test_energy_beats_uniform_and_follows_the_ratio() -> None:
    def lost(ranks: dict[str, int | None]) -> float:
        return sum(0.0 if r is None else float((spectra()[n][r:] ** 2).sum()) for n, r in ranks.items())

    last = math.inf
    for ratio in (0.3, 0.5, 0.7, 0.9):
        even, best = uniform(SHAPES, ratio), energy(spectra(), SHAPES, ratio)
        assert lost(best.ranks) < lost(even.ranks) and lost(best.ranks) < last
        last = lost(best.ranks)
    # the flat spectrum has nothing to give
    ranks = energy(spectra(), SHAPES, 0.8).ranks
    assert ranks["a.up"] is None and ranks["a.q"] is not None and ranks["a.q"] < 20


def test_energy_floor_and_step() -> None:
    found = energy(spectra(), SHAPES, 0.6, step=8, floor=0.4)
    assert all(r is None or numbers(*SHAPES[n], r, pivoted=False) >= 0.38 * math.prod(SHAPES[n]) for n, r in found.ranks.items())
    assert all(r is None or r % 8 == 0 or r == rank_for(*SHAPES[n], 0.4) for n, r in found.ranks.items())


def test_relative_energy_ignores_units() -> None:
    scaled = {n: s * (1000 if n == "b.q" else 1) for n, s in spectra().items()}
    a, b = (energy(s, SHAPES, 0.5, relative=True).ranks for s in (spectra(), scaled))
    assert a == b and energy(scaled, SHAPES, 0.5).ranks != energy(spectra(), SHAPES, 0.5).ranks


def test_optimal_is_near_brute_force() -> None:
    gen = torch.Generator().manual_seed(0)
    shapes = {str(i): (10, 10) for i in range(4)}
    for _ in range(20):
        curves = {}
        for name in shapes:
            costs = sorted(int(c) for c in torch.randint(5, 95, (4,), generator=gen))
            losses = sorted((float(v) for v in torch.rand(4, generator=gen)), reverse=True)
            curves[name] = [Choice(i, c, v) for i, (c, v) in enumerate(zip(costs, losses, strict=True))] + [Choice(None, 100, 0.0)]
        best = min(
            (sum(c.loss for c in picks) for picks in itertools.product(*curves.values()) if sum(c.numbers for c in picks) <= 240), default=None
        )
        if best is None:
            continue
        found = optimal(curves, shapes, 0.6)
        got = sum(next(c.loss for c in curves[n] if c.rank == r) for n, r in found.ranks.items())
        assert found.ratio <= 0.6 and best <= got <= best + 0.5  # the relaxation's gap is at most one layer's step


def test_welore_classes() -> None:
    gen = torch.Generator().manual_seed(0)
    low = torch.randn(64, 10, generator=gen) @ torch.randn(10, 64, generator=gen) + 0.01 * torch.randn(64, 64, generator=gen)
    shapes = {"low": (64, 64), "flat": (64, 64)}
    found = welore({"low": torch.linalg.svdvals(low), "flat": torch.linspace(1, 0.9, 64)}, shapes, 0.7)
    assert found.classes == {"low": "LRC", "flat": "N-LRC"}
    rank = found.ranks["low"]
    assert rank is not None and 1 <= rank <= 13 and found.ranks["flat"] is None and "N-LRC" in found.reasons["flat"]


def test_welore_threshold_is_global_and_monotone() -> None:
    last = math.inf
    for ratio in (0.9, 0.7, 0.5, 0.2):
        found = welore(spectra(), SHAPES, ratio)
        assert found.ratio <= ratio and found.ratio <= last
        last = found.ratio
        assert all(found.ranks[n] is None for n, c in found.classes.items() if c == "N-LRC")


def test_sensitivity_spares_what_hurts() -> None:
    calls: list[dict[str, int]] = []

    def measure(ranks: dict[str, int]) -> float:
        calls.append(dict(ranks))
        kept = sum(numbers(*SHAPES[n], r, pivoted=False) for n, r in ranks.items()) / sum(math.prod(SHAPES[n]) for n in ranks)
        return (1 - kept) * (10 if "a.q" in ranks else 0.1)

    groups = {"a": ["a.q", "a.up"], "b": ["b.q", "b.down"]}
    found = sensitivity(SHAPES, groups, (0.8, 0.6, 0.4), measure, 0.75)
    assert len(calls) == 6 and all(set(c) in ({"a.q", "a.up"}, {"b.q", "b.down"}) for c in calls)
    assert found.ranks["a.q"] is None and found.ranks["a.up"] is None and "group a" in found.reasons["a.q"]
    assert found.ranks["b.q"] == rank_for(48, 48, 0.4) and found.ratio <= 0.75


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.01])
def test_ratios_that_make_no_sense(ratio: float) -> None:
    for call in (lambda: uniform(SHAPES, ratio), lambda: energy(spectra(), SHAPES, ratio), lambda: welore(spectra(), SHAPES, ratio)):
        with pytest.raises(RecipeError) as caught:
            call()
        assert caught.value.code == "E-RCP-RATIO"


def test_budgets_that_nothing_fits() -> None:
    with pytest.raises(RecipeError):
        energy(spectra(), SHAPES, 0.1, floor=0.5)
    with pytest.raises(RecipeError):
        welore({n: torch.tensor([1.0, 1.0, 0.0]) for n in SHAPES}, dict.fromkeys(SHAPES, (3, 3)), 0.2)


def test_summary() -> None:
    found = uniform(SHAPES, 0.5)
    assert summary(found, SHAPES)["q"] == pytest.approx(found.ranks["a.q"] / 48)
