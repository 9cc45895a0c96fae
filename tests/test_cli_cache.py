"""`effllm cache`: tables, reasons, and errors without traceback."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from effllm.autotune.fingerprint import Environment, environment
from effllm.autotune.key import Key
from effllm.autotune.measurement import Measurement
from effllm.autotune.store import Store
from effllm.cli import app
from effllm.lowering.op import Problem

runner = CliRunner()
PROBLEM = Problem("bipolar_linear", 576, 1536, 4, 32, True, dtype=torch.bfloat16)
SHAPE = "m=1,n=576,k=1536,bits=4,group=32"


def call(*args: object) -> tuple[int, str]:
    result = runner.invoke(app, ["cache", *(str(a) for a in args)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "tuning")


def entry(m: int = 1, rows: int = 4, us: float | None = 41.2, status: str = "ok", at: Environment | None = None, **more: object) -> Measurement:
    config = {"path": "registers", "threads": 0, "rows": rows}
    return Measurement(Key.of(PROBLEM, "cpu-avx512", m, **more), config, status, at or environment(), us and us * 1e-6)


def why(store: Store, tmp_path: Path, shape: str = SHAPE, op: str = "bipolar_linear") -> tuple[str, dict]:
    code, output = call("why", op, shape, "--store", store.directory, "--json", tmp_path / "why.json")
    assert code == 0, output
    return output, json.loads((tmp_path / "why.json").read_text())


@pytest.mark.parametrize(
    ("args", "code", "hint"),
    [
        (["why", "bipolar_liner", SHAPE], "E-TUN-OP", "did you mean 'bipolar_linear'"),
        (["why", "bipolar_linear", "m=1,grop=32"], "E-TUN-FIELD", "did you mean 'group'"),
        (["why", "bipolar_linear", "m=1,n576"], "E-TUN-SHAPE", "field=value"),
        (["why", "bipolar_linear", "m=few"], "E-TUN-SHAPE", "m=1"),
        (["why", "bipolar_linear", "n=-5"], "E-TUN-SHAPE", "n=1"),
        (["why", "bipolar_linear"], "E-OPT-VALUE", "'shape'"),
        (["lst"], "E-OPT-COMMAND", "did you mean 'list'"),
        (["list", "--stor", "x"], "E-OPT-KEY", "did you mean '--store'"),
        (["list", "--json", "no-such-folder/x.json"], "E-OPT-WRITE", "folder that exists"),
    ],
)
def test_bad_input_names_the_next_step(args, code, hint):
    status, output = call(*args)
    assert status == 2 and code in output and hint in output and "next step:" in output and "Traceback" not in output


def test_an_empty_store_says_so(store, tmp_path):
    _, found = why(store, tmp_path)
    assert not found["used"] and "no entry of bipolar_linear" in found["line"]
    assert call("list", "--store", store.directory)[0] == 0 and call("compact", "--store", store.directory)[0] == 0
    assert not store.directory.exists()


def test_an_entry_that_applies(store, tmp_path):
    store.append(entry())
    output, found = why(store, tmp_path)
    assert found["used"] and found["differences"] == [] and "an entry applies: exact: 41.2 us" in output


def test_a_configuration_that_the_kernel_does_not_take_any_more_is_named(store, tmp_path):
    old = replace(entry(), config={"path": "registers", "threads": 0})  # of a version before the field was there
    store.append(old)
    output, found = why(store, tmp_path)
    assert not found["used"] and [(d["field"], d["effect"]) for d in found["differences"]] == [("config", "never used")]
    assert "takes rows" in output
    store.append(entry(us=99.0))
    assert "an entry applies: exact: 99.0 us" in why(store, tmp_path)[0]


def test_every_reason_is_named_with_both_values(store, tmp_path):
    now = environment()
    other = Environment({**now.hard, "threads": 99}, {**now.soft, "compiler": "cc 1"})
    store.append(entry(8, source="0123456789abcdef", at=other))
    output, found = why(store, tmp_path, "m=1,n=576,bits=3")
    by_field = {d["field"]: d for d in found["differences"]}
    assert set(by_field) == {"source", "bits", "m_bucket", "hard.threads", "soft.compiler"} and not found["used"]
    assert (by_field["bits"]["wanted"], by_field["bits"]["entry"]) == (3, 4)
    assert (by_field["hard.threads"]["wanted"], by_field["hard.threads"]["entry"]) == (now.hard["threads"], 99)
    assert by_field["source"]["entry"] == "0123456789abcdef"
    assert {f: d["effect"] for f, d in by_field.items()} == {
        "source": "never used", "bits": "never used", "hard.threads": "never used", "m_bucket": "near M bucket", "soft.compiler": "seed: stale",
    }  # fmt: skip
    assert "no entry applies" in output and all(f in output for f in by_field)


def test_the_nearest_of_several_entries_is_shown(store, tmp_path):
    now = environment()
    store.append(entry(64, us=1.0, at=Environment({**now.hard, "model": "Other"}, now.soft)))
    store.append(entry(us=2.0, at=Environment({**now.hard, "threads": 99}, now.soft)))
    store.append(entry(source="old", us=3.0))
    _, found = why(store, tmp_path)
    assert [d["field"] for d in found["differences"]] == ["source"] and found["entry"]["seconds"] == pytest.approx(3e-6)


def test_a_near_entry_is_used_and_the_difference_shown(store, tmp_path):
    store.append(entry(8))
    _, found = why(store, tmp_path)
    assert found["used"] and "near M bucket" in found["line"] and [d["field"] for d in found["differences"]] == ["m_bucket"]


def test_another_bucket_and_another_shape_at_once_are_too_far(store, tmp_path):
    store.append(entry(8))
    _, found = why(store, tmp_path, "m=1,n=600")
    assert not found["used"] and {d["field"]: d["effect"] for d in found["differences"]} == {"n": "never used", "m_bucket": "never used"}


def test_a_wrong_entry_is_the_reason(store, tmp_path):
    store.append(entry(us=None, status="wrong"))
    _, found = why(store, tmp_path)
    assert not found["used"] and [(d["field"], d["entry"]) for d in found["differences"]] == [("status", "wrong")]


def test_the_list_shows_best_state_and_damage(store, tmp_path):
    now = environment()
    store.append(entry(rows=8, us=50.0))
    store.append(entry(rows=4, us=41.2))
    store.append(entry(2, us=None, status="oom"))
    store.append(entry(4, at=Environment(now.hard, {**now.soft, "compiler": "cc 1"})))
    store.append(entry(8, source="old"))
    store.append(entry(16, at=Environment({**now.hard, "threads": 99}, now.soft)))
    (path,) = (p for p in store.paths() if p == store.path(now, "bipolar_linear"))
    with open(path, "a") as file:
        file.write("rubbish\n")
    with pytest.warns(UserWarning, match="line 6"):
        code, output = call("list", "--store", store.directory, "--json", tmp_path / "list.json")
    assert code == 0 and "line 6: not JSON" in output and "rows=4" in output and "41.2" in output
    rows = {r["m_bucket"]: r for r in json.loads((tmp_path / "list.json").read_text())["rows"]}
    assert {m: r["state"] for m, r in rows.items()} == {1: "current", 2: "current", 4: "stale", 8: "other sources", 16: "other machine"}
    assert (rows[1]["config"], rows[1]["tried"]) == ({"path": "registers", "threads": 0, "rows": 4}, 2) and rows[2]["status"] == "oom"


def test_compact_reports_what_it_did(store, tmp_path):
    for us in (1.0, 2.0):
        store.append(entry(us=us))
    code, _ = call("compact", "--store", store.directory, "--json", tmp_path / "c.json")
    assert code == 0
    found = json.loads((tmp_path / "c.json").read_text())
    assert {k: found[k] for k in ("files", "kept", "dropped", "damaged")} == {"files": 1, "kept": 1, "dropped": 1, "damaged": 0}


def test_a_provider_that_is_gone_is_listed_as_such(store):
    gone = entry()
    store.append(replace(gone, key=replace(gone.key, provider="cpu_old")))
    assert "unknown provider" in call("list", "--store", store.directory)[1]
