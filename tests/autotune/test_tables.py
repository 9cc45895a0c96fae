"""Shipped measurements: read, never written; behind the user's own, and a seed for a search."""

from __future__ import annotations

import pytest
import torch

from benchmarks import ship_table
from effllm.autotune import search, tables
from effllm.autotune.key import provider_source
from effllm.autotune.measurement import Measurement
from effllm.autotune.store import Store
from effllm.lowering import providers
from effllm.lowering.op import OPS, Problem, Verdict
from tests.autotune.made import HERE, OTHER_HARD, OTHER_SOFT, key, took
from tests.autotune.simulated import BowlTuning, Simulated, provider

ALL = Verdict(True)


@pytest.fixture
def folder(tmp_path):
    source = Store(tmp_path / "from")
    for m in (took(30.0, bn=64), took(20.0, bn=128), took(25.0, bn=128), took(None, bn=8, status="wrong"), took(9.0, bn=4, at=OTHER_HARD)):
        source.append(m)
    assert tables.keep_best(source, tmp_path / "tables") == 2  # one per machine; the newest time of a configuration counts
    return tmp_path / "tables"


def find(folder, own=None, of=None, at=HERE, legal=lambda c: ALL):
    return tables.find(own, of or key(), legal, at, folder)


def test_the_fastest_of_each_machine_is_kept_and_only_used_there(folder):
    found, was_shipped = find(folder)
    assert was_shipped and found.config == {"bn": 128} and found.seconds == pytest.approx(25e-6)
    assert find(folder, at=OTHER_HARD)[0].config == {"bn": 4}
    assert find(folder, of=key(source="other")) == (None, False)
    assert find(folder, at=OTHER_SOFT)[0].stale  # another version: a seed
    assert find(folder, legal=lambda c: Verdict(False, "gone")) == (None, False)


def test_own_measurements_of_the_problem_come_first_and_own_neighbours_last(folder, tmp_path):
    own = Store(tmp_path / "own")
    own.append(took(50.0, bn=16, of=key(m=8)))
    near = own.find(key(), environment=HERE)
    assert near.how == "near M bucket" and find(folder, near)[0].config == {"bn": 128}
    assert find(folder, own.find(key(m=4), environment=HERE), of=key(m=4))[0].config == {"bn": 16}  # both near: one's own
    own.append(took(50.0, bn=32))
    assert find(folder, own.find(key(), environment=HERE)) == (own.find(key(), environment=HERE), False)


def test_reading_writes_nothing(folder):
    before = sorted((p.name, p.stat().st_mtime_ns) for p in folder.iterdir())
    folder.chmod(0o555)
    find(folder)
    folder.chmod(0o755)
    assert before == sorted((p.name, p.stat().st_mtime_ns) for p in folder.iterdir()) and all(name.endswith(".jsonl") for name, _ in before)


def test_the_script_makes_them(tmp_path, capsys):
    Store(tmp_path / "from").append(took(30.0))
    assert ship_table.main(["--store", str(tmp_path / "from"), "--to", str(tmp_path / "to")]) == 0
    assert "1 problems added" in capsys.readouterr().out and len(Store(tmp_path / "to").load()) == 1


def test_no_tables_is_no_answer(tmp_path):
    assert find(tmp_path / "missing") == (None, False)


def test_a_search_measures_what_was_shipped_first(folder, tmp_path, monkeypatch):
    seed = {"path": "gemv", "tile": 256, "stages": 4}
    source = Store(tmp_path / "seed")
    source.append(Measurement(key(), seed, "ok", HERE, 1e-6))
    tables.keep_best(source, tmp_path / "seeds")
    monkeypatch.setattr(tables, "FOLDER", tmp_path / "seeds")
    problem = Problem("bipolar_linear", 576, 1536, 4, 32, True, "a16", 1, torch.bfloat16)
    found = search.tune(provider(BowlTuning(0.2)), problem, Store(tmp_path / "own"), 1e6, Simulated(), key=key(), environment=HERE)
    assert found.trials[0].config == seed and not found.trials[0].known and found.best.config["tile"] == 64


def test_what_is_shipped_is_legal_and_of_the_present_sources():
    store = tables.shipped(tables.FOLDER)
    providers.load("cpu")
    for m in store.load() if store is not None else []:
        assert m.key.source == provider_source(m.key.provider, m.key.op) and m.status == "ok" and m.key.op in OPS
