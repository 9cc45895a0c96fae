"""`effllm trace` and `effllm bench --serve-trace` on a tiny model: files, figures that add up, options that do not fit together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from effllm.runtime.trace import read
from tests.hf.tiny import tiny_dir
from tests.test_cli import call


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("serve")
    tiny_dir(root / "model")
    status, output = call("trace", root / "t.jsonl", "--requests", 12, "--rate", 200, "--longest", 300, "--kind", "code", "--seed", 1)
    assert status == 0 and output.startswith("12 requests over")
    return root


def test_both_policies_serve_the_whole_trace(place: Path) -> None:
    trace = read(place / "t.jsonl")
    status, output = call("bench", place / "model", "--serve-trace", place / "t.jsonl", "--budget", 40, "--sequences", 4, "--json", place / "r.json")
    assert status == 0 and "whole prompts" in output
    result = json.loads((place / "r.json").read_text())
    chunked, whole = result["rows"]
    for row in (chunked, whole):
        assert row["new_tokens"] == sum(a.new for a in trace) and row["prompt_tokens"] == sum(a.prompt for a in trace) and row["requests"] == 12
        times = row["time_between_tokens_s"]
        assert 0 < times["p50"] <= times["p90"] <= times["p99"] <= times["max"] < row["seconds"]
    assert chunked["largest_prompt_part"] <= 40 < max(a.prompt for a in trace) <= whole["largest_prompt_part"]


def test_recipes_pack_first_and_the_budget_is_measured(place: Path) -> None:
    status, _ = call("bench", place / "model", "--serve-trace", place / "t.jsonl", "--recipe", "w8", "--sequences", 3, "--json", place / "r.json")
    assert status == 0
    row = json.loads((place / "r.json").read_text())["rows"][0]
    assert row["recipe"] == "w8" and row["budget"] >= 3 + 4 and (row["budget"] - 3) % 4 == 0


@pytest.mark.parametrize(
    ("args", "code", "hint"),
    [
        (["--serve-trace", "no-such"], "E-OPT-TRACE", "effllm trace"), (["--budget", 9], "E-OPT-SERVE", "--serve-trace FILE"),
        (["--serve-trace", "t.jsonl", "--rounds", 2], "E-OPT-SERVE", "--rounds"),
        (["--serve-trace", "t.jsonl", "--budget", 2], "E-OPT-BUDGET", "token per sequence"),
        (["--serve-trace", "t.jsonl", "--recipe", "w8", "--recipe", "w4"], "E-OPT-SERVE", "one --recipe"),
        (["--serve-trace", "long.jsonl"], "E-OPT-TRACE", "--longest"),
        (["--serve-trace", "t.jsonl", "--kernels"], "E-OPT-SERVE", "--kernels"), (["--serve-trace", "bad.jsonl"], "E-OPT-TRACE", "line 1"),
    ],
)  # fmt: skip
def test_bad_input_names_the_next_step(place: Path, args: list, code: str, hint: str) -> None:
    (place / "long.jsonl").write_text('{"arrival": 0, "prompt": 1024, "new": 2}\n')
    (place / "bad.jsonl").write_text("{}\n")
    status, output = call("bench", place / "model", *[place / a if str(a).endswith(".jsonl") else a for a in args])
    assert status == 2 and code in output and hint in output and "Traceback" not in output


def test_bad_traces_are_not_written(place: Path) -> None:
    status, output = call("trace", place / "x.jsonl", "--kind", "poem")
    assert status == 2 and "E-OPT-TRACE" in output and not (place / "x.jsonl").exists()
