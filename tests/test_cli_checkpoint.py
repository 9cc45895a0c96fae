"""The command line on a checkpoint directory: scored, timed and explained as it is, and packed by no recipe again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from effllm.cli import app
from effllm.hf import evaluate, models, texts
from effllm.hf.scoring import for_scoring
from effllm.runtime.checkpoint import load
from effllm.runtime.recorded import recipe_of
from tests.hf.tiny import tiny_dir, tiny_text

runner = CliRunner()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    tiny_dir(root / "model")
    (root / "text.txt").write_text(tiny_text(1100))
    status, output = call("compress", root / "model", root / "packed", "--recipe", "w4")
    assert status == 0, output
    return root


def call(*args: object) -> tuple[int, str]:
    result = runner.invoke(app, [str(a) for a in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def result_of(folder: Path, *args: object) -> tuple[dict[str, Any], str]:
    status, output = call(*args, "--json", folder / "result.json")
    assert status == 0, output
    return json.loads((folder / "result.json").read_text()), output


def without(place: Path, folder: Path, *names: str) -> Path:
    shutil.copytree(place / "packed", folder)
    for name in names:
        (folder / name).unlink()
    return folder


def test_eval_alone_gives_the_perplexity_and_says_what_is_missing(place: Path) -> None:
    found, output = result_of(place, "eval", place / "packed", "--text", place / "text.txt", "--png", place / "alone.png")
    windows = texts.windows(models.tokenizer_of(place / "packed"), tiny_text(1100))
    scored, why = for_scoring({"": load(place / "packed")})
    assert found["perplexity"] == pytest.approx(evaluate.perplexity(scored[""], windows)) and found.get("scored") == why
    assert found["kl"] is None and found["top1_agreement"] is None and found["tokens"] == 2 * 511
    assert found["recipe"] == "w4" and "dense_perplexity" not in found
    assert "--reference" in found["comparison"] and "--reference" in output
    assert (place / "alone.png").stat().st_size > 5000


def test_eval_with_a_reference_is_the_eval_of_the_dense_model(place: Path) -> None:
    found, output = result_of(place, "eval", place / "packed", "--text", place / "text.txt", "--reference", place / "model")
    whole, _ = result_of(place, "eval", place / "model", "--recipe", "w4", "--text", place / "text.txt")
    assert found == whole and found["kl"] > 0
    assert "--reference" not in output


def test_eval_at_fewer_bits_reads_fewer_bytes_and_is_worse(place: Path) -> None:
    common = ("eval", place / "packed", "--text", place / "text.txt", "--reference", place / "model")
    at4, at2 = result_of(place, *common)[0], result_of(place, *common, "--bits", 2)[0]
    assert at2["weight_bytes"] < at4["weight_bytes"] and at2["kl"] > at4["kl"]
    assert at2["recipe"] == "w4 at 2 bits"


def test_explain_lists_the_packed_modules(place: Path) -> None:
    found, output = result_of(place, "explain", place / "packed", "--bits", 3)
    first = found["passes"][0]
    assert first["name"] == "packed" and len(first["decisions"]) == 16
    assert {d["config"]["bits"] for d in first["decisions"]} == {3}
    assert sum(d["code"] == "tied" for d in first["decisions"]) == 1
    assert "w4 at 3 bits" in output


@pytest.mark.slow
def test_bench_runs_the_checkpoint_as_it_is(place: Path) -> None:
    short = ("--tokens", 4, "--prefill", 16, "--rounds", 1, "--eager-prefill", "--text", place / "text.txt", "--windows", 1)
    found, output = result_of(place, "bench", place / "packed", *short)
    (row,) = found["rows"]
    assert row["variant"] == "effllm-w4" and row["recipe"] == "w4"
    assert row["perplexity"] > 1 and row["kl"] is None and row["decode_tok_s"] > 0
    assert "--reference" in output
    more = ("--reference", place / "model", "--baseline", "eager-bf16", "--recipe", "w4", "--bits", 3)
    found, _ = result_of(place, "bench", place / "packed", *short, *more)
    assert [r["variant"] for r in found["rows"]] == ["eager-bf16", "effllm-w4 at 3 bits", "effllm-w4"]
    dense, three, four = found["rows"]
    assert dense["kl"] == 0 and three["kl"] > four["kl"] > 0


@pytest.mark.parametrize(
    ("args", "code", "hint"),
    [
        (["compress", "packed", "again"], "E-OPT-PACKED", "dense model's directory"),
        (["eval", "packed", "--recipe", "w4", "--text", "text.txt"], "E-OPT-PACKED", "leave --recipe out"),
        (["eval", "packed", "--text", "text.txt", "--calibrate", "text.txt"], "E-OPT-PACKED", "leave --calibrate out"),
        (["eval", "packed", "--text", "text.txt", "--reference", "packed"], "E-OPT-REFERENCE", "dense model"),
        (["eval", "packed", "--text", "text.txt", "--bits", "8"], "E-OPT-BITS", "leave --bits out"),
        (["eval", "packed", "--text", "text.txt", "--bits", "9"], "E-OPT-VALUE", "--bits"),
        (["eval", "packed"], "E-OPT-TEXT", "--text"),
        (["eval", "model", "--text", "text.txt", "--bits", "3"], "E-OPT-BITS", "--recipe w3"),
        (["eval", "model", "--text", "text.txt", "--reference", "model"], "E-OPT-REFERENCE", "its own reference"),
        (["bench", "packed", "--baseline", "eager-bf16"], "E-OPT-BASELINE", "--reference MODEL"),
        (["bench", "packed", "--recipe", "w4"], "E-OPT-PACKED", "--reference MODEL"),
        (["bench", "model", "--bits", "3"], "E-OPT-BITS", "--recipe w3"),
        (["explain", "model", "--bits", "3"], "E-OPT-BITS", "--recipe w3"),
    ],
)
def test_options_that_do_not_go_together(place: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], code: str, hint: str) -> None:
    monkeypatch.chdir(place)
    status, output = call(*args)
    assert status == 2 and code in output and hint in output and "next step:" in output
    assert not (place / "again").exists()


def test_directories_that_lack_something(place: Path, tmp_path: Path) -> None:
    bare = without(place, tmp_path / "bare", "tokenizer.json", "tokenizer_config.json")
    partial = without(place, tmp_path / "partial", "tokenizer.json")
    headless = without(place, tmp_path / "headless", "config.json")
    for folder, code in ((bare, "E-OPT-TOKENIZER"), (partial, "E-OPT-TOKENIZER"), (headless, "E-CKP-MODEL")):
        status, output = call("eval", folder, "--text", place / "text.txt")
        assert status == 2 and code in output and "next step:" in output, output
    # a reference lends its tokenizer
    status, output = call("eval", bare, "--text", place / "text.txt", "--reference", place / "model")
    assert status == 0, output


def test_the_name_of_the_recipe_survives_and_is_derived_where_it_is_missing(place: Path) -> None:
    model = load(place / "packed")
    assert recipe_of(model) == "w4" and recipe_of(load(place / "packed", bits=2)) == "w4 at 2 bits"
    assert recipe_of(load(place / "packed", bits=8)) == "w4"
    del model._effllm_recipe
    assert recipe_of(model) == "w4"  # by the bits of most weights
