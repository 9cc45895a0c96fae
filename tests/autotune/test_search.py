"""The search on a simulated device: it finds, stops, resumes, widens, and keeps what failed."""

from __future__ import annotations

import dataclasses
import errno
import os

import pytest
import torch

from effllm.autotune import search, space
from effllm.autotune.measurement import Measurement
from effllm.autotune.store import Store
from effllm.errors import TuneError
from effllm.lowering.op import Problem
from tests.autotune.made import HERE, OTHER_SOFT, key
from tests.autotune.simulated import BowlTuning, Simulated, provider, true_seconds

PROBLEM = Problem("bipolar_linear", 576, 1536, 4, 32, True, "a16", 1, torch.bfloat16)
BEST = {"path": "gemm", "tile": 64, "stages": 3}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "tuning")


def tune(store, runner, tuning=None, budget=1e6, **more):
    more = {"key": key(), "environment": HERE, "clock": lambda: runner.now} | more
    return search.tune(provider(tuning or BowlTuning(0.5)), PROBLEM, store, budget, runner, **more)


@pytest.mark.parametrize("error", [0.0, 0.2, 0.5])
def test_it_finds_the_best_with_few_trials(store, error):
    runner = Simulated()
    found = tune(store, runner, BowlTuning(error))
    assert found.best.config == BEST and found.best.seconds == pytest.approx(20e-6)
    assert found.measured == len(runner.checked) <= 24  # of 40


def test_everything_is_stored_at_once_and_a_second_run_measures_nothing(store):
    runner = Simulated()
    first = tune(store, runner)
    assert len(store.load()) == first.measured and all(m.predicted and m.n == 20 for m in store.load())
    again = tune(Store(store.directory), runner)
    assert again.measured == 0 and len(runner.checked) == first.measured
    assert again.best.config == first.best.config and again.first.config == first.first.config
    assert store.find(key(), environment=HERE).config == first.best.config


def test_a_search_that_was_cut_short_goes_on(store):
    runner = Simulated()
    part = tune(store, runner, budget=4)
    assert part.stopped == "budget" and 0 < part.measured < 6
    assert len(store.load()) == part.measured  # what was verified was timed and kept
    rest = tune(store, runner)
    assert rest.best.config == BEST and len(runner.checked) == len({space.text_of(c) for c in runner.checked})


def test_failures_are_kept_and_never_tried_again(store):
    runner = Simulated(status=lambda c: "wrong" if c["tile"] == 64 else "timeout" if c["tile"] == 256 else "ok")
    found = tune(store, runner, BowlTuning(0.2))
    assert found.best.config["tile"] in (32, 128)
    assert {m.status for m in store.load()} >= {"wrong", "ok"} and any("wrong, made up" in n for n in found.notes)
    checked = len(runner.checked)
    tune(store, runner, BowlTuning(0.2))
    assert len(runner.checked) == checked


def test_nothing_right_is_a_result(store):
    found = tune(store, Simulated(status=lambda c: "error"))
    assert found.best is None and found.first.status == "error" and found.stopped == "no candidate is right"


def test_it_stops_near_the_bound(store):
    found = tune(store, Simulated(), BowlTuning(0.0, bound=19e-6))
    assert "of the bound" in found.stopped and found.measured <= 6
    assert tune(Store(store.directory / "b"), Simulated(), BowlTuning(0.0)).stopped != found.stopped


def test_a_model_that_ranks_badly_widens_the_search(store):
    # the model believes the opposite of what is
    class Wrong(BowlTuning):
        def predict(self, problem, config):
            p = super().predict(problem, config)
            return dataclasses.replace(p, seconds=4e-10 / p.seconds)

    found = tune(store, Simulated(), Wrong())
    assert any("widened" in n and "Spearman" in n for n in found.notes) and found.spearman < 0.7
    assert found.best.config["path"] == "gemm"  # the diverse candidates led out of the wrong corner
    good = tune(Store(store.directory / "b"), Simulated(), BowlTuning(0.0))
    assert not good.notes and good.spearman == pytest.approx(1.0)


def test_other_load_is_refused_and_not_stored(store):
    runner = Simulated()
    runner.refuse = 1
    assert tune(store, runner).best.config == BEST  # one burst is waited out
    other = Store(store.directory / "b")
    runner.refuse = 2
    busy = tune(other, runner)
    assert busy.measured == 0 and "cores busy" in busy.stopped and not other.load()


@pytest.mark.parametrize("budget", [0, -3, float("nan")])
def test_no_budget_is_an_error(store, budget):
    with pytest.raises(TuneError, match="E-TUN-BUDGET"):
        tune(store, Simulated(), budget=budget)


@pytest.mark.parametrize("change", [{"m": None}, {"m": 0}, {"n": 0}, {"k": -1}])
def test_an_impossible_shape_is_an_error(store, change):
    with pytest.raises(TuneError, match="E-TUN-SHAPE"):
        search.tune(provider(BowlTuning()), dataclasses.replace(PROBLEM, **change), store, 1, Simulated(), key=key(), environment=HERE)


def test_a_provider_without_configurations_is_an_error(store):
    with pytest.raises(TuneError, match="E-TUN-PROVIDER"):
        search.tune(dataclasses.replace(provider(BowlTuning()), tuning=None), PROBLEM, store, 1, Simulated(), key=key(), environment=HERE)


def test_an_op_nobody_knows_is_an_error(store):
    with pytest.raises(TuneError, match="E-TUN-PROVIDER"):
        search.tune(provider(BowlTuning()), dataclasses.replace(PROBLEM, op="bipolar_liner"), store, 1, Simulated())


def test_a_store_that_cannot_be_written_is_found_before_measuring(tmp_path):
    (tmp_path / "file").write_text("")
    runner = Simulated()
    with pytest.raises(TuneError, match="E-TUN-WRITE"):
        tune(Store(tmp_path / "file" / "tuning"), runner)
    assert not runner.checked


def test_a_full_disk_ends_the_search_and_keeps_what_was_measured(store, monkeypatch):
    real, writes = os.write, []

    def full(handle, data):
        writes.append(handle)
        if len(writes) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(TuneError, match="E-TUN-WRITE"):
        tune(store, Simulated())
    monkeypatch.undo()
    assert len(Store(store.directory).load()) == 2


def test_a_clock_that_goes_back_neither_ends_nor_hides_results(store):
    """The budget runs on a monotonic clock; the store orders by its own numbers."""
    runner = Simulated()
    store.append(Measurement(key(), BEST, "ok", HERE, 90e-6, when=4e9))
    store.append(Measurement(key(), BEST, "ok", HERE, 20e-6, when=1e9))
    found = tune(store, runner)
    assert found.best.config == BEST and found.best.known and found.best.seconds == pytest.approx(20e-6)


def test_an_entry_that_is_no_longer_legal_is_named_and_not_used(store):
    store.append(Measurement(key(), {"path": "gemm", "tile": 512, "stages": 3}, "ok", HERE, 1e-6))
    found = tune(store, Simulated())
    assert found.best.config == BEST and any("no longer legal" in n for n in found.notes)


def test_results_of_other_software_are_measured_again(store):
    seed = BEST | {"tile": 256}
    store.append(Measurement(key(), BEST, "ok", OTHER_SOFT, 3e-6))
    store.append(Measurement(key(), seed, "ok", OTHER_SOFT, 1e-6))
    found = tune(store, Simulated())
    assert not found.best.known and found.trials[0].config == seed  # a seed, and tried first
    assert tune(store, Simulated()).measured == 0


def test_exhaustive_tries_all_and_random_the_number_asked_for(store, tmp_path):
    more = {"key": key(), "environment": HERE}
    every = search.exhaustive(provider(BowlTuning()), PROBLEM, store, Simulated(), **more)
    assert every.measured == 40 and every.best.config == BEST and every.reached(every.best.seconds) == 1  # the model is exact here
    orders = []
    for seed in (0, 0, 1):
        some = search.random_search(provider(BowlTuning()), PROBLEM, Store(tmp_path / str(len(orders))), Simulated(), 12, seed=seed, **more)
        assert some.measured == 12
        orders.append([t.config for t in some.trials])
    assert orders[0] == orders[1] != orders[2]


def test_the_tuner_ends_no_worse_than_a_random_search_of_four_times_the_trials(tmp_path):
    """On three simulated devices that the model misjudges by up to 40 %, against ten random orders (the space has 40 configurations)."""
    for device in range(3):

        def seconds(config, device=device):
            shift = (config["stages"] - 2) * 0.03 * (device - 1)
            return true_seconds(config) * (1 + shift)

        for_tuner = tune(Store(tmp_path / f"t{device}"), Simulated(seconds), BowlTuning(0.4))
        quarters = []
        for seed in range(10):
            where = Store(tmp_path / f"r{device}-{seed}")
            control = search.random_search(provider(BowlTuning(0.4)), PROBLEM, where, Simulated(seconds), 40, seed=seed, key=key(), environment=HERE)
            quarters.append(for_tuner.reached(control.trials and min(t.seconds for t in control.trials[: 4 * for_tuner.measured])) is not None)
        assert all(quarters)


def test_neighbours_change_one_field_by_one_step():
    made = space.Space(BowlTuning().configs(PROBLEM), true_seconds)
    near = made.neighbours(BEST)
    assert {space.text_of(c) for c in near} == {
        space.text_of(BEST | change) for change in ({"path": "gemv"}, {"tile": 32}, {"tile": 128}, {"stages": 2}, {"stages": 4})
    }
    corner = made.neighbours({"path": "gemv", "tile": 16, "stages": 1})
    assert len(corner) == 3


def test_a_step_that_needs_another_field_takes_the_nearest_legal_one():
    legal = [{"a": 1, "b": 8}, {"a": 2, "b": 4}, {"a": 2, "b": 1}, {"a": 4, "b": 2}]  # a * b <= 8, mostly
    made = space.Space(legal, lambda c: 1.0)
    assert {"a": 2, "b": 4} in made.neighbours({"a": 1, "b": 8}) and {"a": 2, "b": 1} not in made.neighbours({"a": 1, "b": 8})


def test_the_start_holds_other_kinds():
    made = space.Space(BowlTuning().configs(PROBLEM), true_seconds)
    start = made.start(BEST, 4, 2)
    assert len(start) == 6 and start[0] == BEST and {c["path"] for c in start} == {"gemm", "gemv"}


def test_spearman():
    assert space.spearman([(1, 10), (2, 20), (3, 30)]) == pytest.approx(1.0)
    assert space.spearman([(1, 3), (2, 2), (3, 1)]) == pytest.approx(-1.0)
    assert space.spearman([(1, 1), (1, 2), (2, 3), (2, 4)]) == pytest.approx(0.894, abs=1e-3)  # ties share ranks
    assert space.spearman([(1, 1), (1, 2)]) == 1.0
