"""The command line on a tiny model: results, files, and errors without traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from effllm.cli import app
from effllm.runtime.recorded import recipe_of
from tests.hf.tiny import tiny_dir, tiny_text

runner = CliRunner()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    tiny_dir(root / "model")
    (root / "text.txt").write_text(tiny_text())
    return root


def call(*args: object) -> tuple[int, str]:
    result = runner.invoke(app, [str(a) for a in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("args", "code", "hint"),
    [
        (["bnch"], "E-OPT-COMMAND", "did you mean 'bench'"),
        (["doctor", "--jsn", "x"], "E-OPT-KEY", "did you mean '--json'"),
        (["bench", "demo", "--rounds", "many"], "E-OPT-VALUE", "--rounds"),
        (["bench", "demo", "--rounds", "0"], "E-OPT-VALUE", "--rounds"),
        (["bench", "demo", "--baseline", "eager-bf17"], "E-OPT-BASELINE", "did you mean 'eager-bf16'"),
        (["bench", "no-such-folder"], "E-OPT-MODEL", "no-such-folder"),
        (["eval", "demo", "--json", "no-such-folder/x.json"], "E-OPT-WRITE", "folder that exists"),
        (["eval", "demo", "--recipe", "bipolar(bit=4)"], "E-RCP-KEY", "did you mean 'bits'"),
        (["compress", "demo"], "E-OPT-VALUE", "'out'"),
        (["tune", "demo", "--budget", "soon"], "E-OPT-BUDGET", "120s"),
        (["tune", "demo", "--budget", "0"], "E-OPT-BUDGET", "no time"),
        (["tune", "demo", "--budget", "-2m"], "E-OPT-BUDGET", "no time"),
        (["explain", "demo", "--recipe", "w9"], "E-RCP-METHOD", "w8"),
    ],
)
def test_bad_input_names_the_next_step(args, code, hint):
    exit_code, output = call(*args)
    assert exit_code == 2
    assert code in output and hint in output and "next step:" in output
    assert "Traceback" not in output


def test_compress_writes_a_checkpoint_that_loads(place):
    from effllm.hf.models import resolve

    status, output = call("compress", place / "model", place / "packed", "--recipe", "w4", "--json", place / "c.json")
    assert status == 0, output
    assert json.loads((place / "c.json").read_text())["recipe"] == "w4"
    model, tokenizer = resolve(str(place / "packed"))
    assert tokenizer is not None and type(model.model.layers[0].mlp.up_proj).__name__ == "PackedLinear"
    assert recipe_of(model) == "w4"


def test_eval_gives_the_promised_keys(place):
    status, output = call("eval", place / "model", "--recipe", "w8", "--text", place / "text.txt", "--json", place / "e.json", "--png", place / "e.png")
    assert status == 0, output
    found = json.loads((place / "e.json").read_text())
    assert {"perplexity", "kl", "top1_agreement", "tokens", "weight_bytes"} <= set(found)
    assert found["tokens"] == 3 * 511
    # 8 bits at group 32: near-lossless even on random weights
    assert found["perplexity_ratio"] == pytest.approx(1, abs=0.02) and 0 <= found["kl"] < 0.02
    assert found["weight_bytes"] < 0.65 * found["dense_weight_bytes"]
    assert (place / "e.png").read_bytes()[:4] == b"\x89PNG"


def test_eval_without_text_or_with_too_little_of_it(place):
    status, output = call("eval", place / "model")
    assert status == 2 and "E-OPT-TEXT" in output
    (place / "short.txt").write_text(tiny_text(100))
    status, output = call("eval", place / "model", "--text", place / "short.txt")
    assert status == 2 and "E-CAL-SHORT" in output


def test_explain_shows_a_decision_for_every_linear(place):
    status, output = call("explain", place / "model", "--recipe", "w4", "--json", place / "x.json")
    assert status == 0, output
    found = json.loads((place / "x.json").read_text())
    applied = {d["module"] for p in found["passes"] for d in p["decisions"] if d["action"] == "applied"}
    assert any("down_proj" in name for name in applied)
    assert {r["module"] for r in found["preview"]} >= {"model.embed_tokens", "lm_head"}


def test_doctor_says_which_kernels_run(place):
    status, output = call("doctor", "--json", place / "d.json")
    assert status == 0, output
    found = json.loads((place / "d.json").read_text())
    used = [r for r in found["kernels"] if r["used"] and r["device"] == "cpu"]
    assert sorted(b for r in used for b in r["bits"]) == sorted(2 * list(range(1, 9)))
    assert all(r["reason"] for r in found["kernels"])
    assert found["machine"]["read_bandwidth_gb_s"] > 0


def test_output_without_a_terminal_is_plain(place):
    _, output = call("eval", place / "model", "--text", place / "text.txt")
    assert "\x1b" not in output and "eval: scoring" in output


def test_nothing_is_left_behind_by_a_failed_compress(place):
    status, output = call("compress", place / "model", place / "never", "--calibrate", Path("no-such-text"))
    assert status == 2 and "E-OPT-TEXT" in output
    assert not (place / "never").exists()
