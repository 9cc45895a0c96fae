"""Candidates that crash, hang or lie, in a worker process: each is a result, and the run goes on."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from effllm.autotune import inputs, measure, search
from effllm.autotune.store import Store
from effllm.autotune.worker import Worker, problem_from_dict, problem_to_dict
from effllm.errors import TuneError
from effllm.lowering import providers
from effllm.lowering.op import Problem
from tests.autotune.bad_providers import PROVIDER, WAYS
from tests.autotune.made import HERE, key

providers.load("cpu")
PROBLEM = Problem("bipolar_linear", 32, 128, 4, 32, True, "a16", 2, torch.float32)
WANTED = {
    "right": "ok", "abort": "error", "segfault": "error", "killed": "oom", "exit": "error", "hang": "timeout", "raise": "error",
    "memory": "oom", "wrong": "wrong", "swapped": "wrong", "unwritten": "wrong",
}  # fmt: skip


@pytest.fixture(scope="module")
def worker():
    with Worker(["tests.autotune.bad_providers"], seconds=0.01, slack=None) as made:
        yield made


def test_a_problem_survives_the_pipe():
    assert problem_from_dict(problem_to_dict(PROBLEM)) == PROBLEM


@pytest.mark.parametrize(("way", "status"), WANTED.items())
def test_each_way_to_fail_is_an_outcome(worker, way, status):
    outcome = worker.check(PROVIDER, PROBLEM, {"way": way}, timeout=3 if way == "hang" else 60)
    assert outcome.status == status, outcome
    assert (outcome.reason == "") == (status == "ok")


def test_the_worker_lives_on_between_candidates(worker):
    assert worker.check(PROVIDER, PROBLEM, {"way": "right"}).status == "ok"
    before = worker.starts
    for way in ("right", "raise", "wrong", "right"):
        worker.check(PROVIDER, PROBLEM, {"way": way})
    assert worker.starts == before
    worker.check(PROVIDER, PROBLEM, {"way": "abort"})
    assert worker.check(PROVIDER, PROBLEM, {"way": "right"}).status == "ok" and worker.starts == before + 1


def test_a_search_over_all_of_them_ends_with_the_right_one(worker, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "_TIMEOUT", 10.0)
    store = Store(tmp_path)
    found = search.exhaustive(PROVIDER, PROBLEM, store, worker, key=key(), environment=HERE)
    assert found.best is not None and found.best.config == {"way": "right"}
    stored = {m.config["way"]: m.status for m in store.load()}
    # it came through its check, and then ended the session in which the others were timed
    assert stored == WANTED | {"late": "error"} and len(stored) == len(WAYS)
    again = search.exhaustive(PROVIDER, PROBLEM, store, worker, key=key(), environment=HERE)
    assert again.measured == 0 and again.best is not None and again.best.config == {"way": "right"}


@pytest.mark.parametrize(
    ("provider", "change", "code"), [({"name": "gone"}, {}, "E-TUN-PROVIDER"), ({}, {"op": "bipolar_liner"}, "E-TUN-OP"), ({}, {"bits": 9}, "E-TUN-SHAPE")]
)
def test_what_the_worker_cannot_run_at_all_is_no_result(worker, provider, change, code):
    with pytest.raises(TuneError, match=code):
        worker.check(dataclasses.replace(PROVIDER, **provider), dataclasses.replace(PROBLEM, **change), {"way": "right"})


def test_a_worker_that_cannot_start_says_so(monkeypatch):
    monkeypatch.setattr("sys.executable", "/no/such/python")
    with pytest.raises(TuneError, match="E-TUN-WORKER"):
        Worker().check(PROVIDER, PROBLEM, {"way": "right"})


@pytest.mark.parametrize("op", ["bipolar_linear", "bipolar_linear_a8", "bipolar_linear_many", "bipolar_linear_a8_many"])
@pytest.mark.parametrize(("n", "k", "m"), [(48, 100, 1), (80, 576, 17)])
def test_every_configuration_of_the_cpu_kernels_is_right(op, n, k, m):
    from effllm.lowering.op import OPS

    problem = Problem(op, n, k, 4, 32, True, "a8" if "a8" in op else "a16", m, torch.bfloat16)
    local = measure.Local()
    for provider in OPS[op].providers.values():
        if provider.device == "cpu" and provider.tuning is not None and provider.supports(problem):
            for config in provider.tuning.configs(problem):
                assert local.check(provider, problem, config).status == "ok", (provider.name, config)


def test_copies_exceed_the_cache_and_are_apart():
    made = inputs.make(PROBLEM, "tile16", copies=3)
    assert len({a[1].data_ptr() for a in made.args}) == 3 and all(torch.equal(a[1], made.args[0][1]) for a in made.args)
    assert inputs.rotation(1 << 20, "cpu") * (1 << 20) >= 2 * inputs.cache_bytes("cpu") or inputs.cache_bytes("cpu") > 256 << 20
    assert inputs.parts(16) == [16] and sum(inputs.parts(960)) == 960 and len(inputs.parts(960)) == 3


@pytest.mark.parametrize(
    ("change", "code"),
    [({"op": "bipolar_liner"}, "E-TUN-OP"), ({"op": "decode_attention"}, "E-TUN-OP"), ({"n": 0}, "E-TUN-SHAPE"), ({"bits": 9}, "E-TUN-SHAPE"),
     ({"m": None}, "E-TUN-SHAPE"), ({"op": "bipolar_linear_many", "n": 33}, "E-TUN-SHAPE")],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(change, code):
    with pytest.raises(TuneError, match=code):
        inputs.make(dataclasses.replace(PROBLEM, **change), "planes")
