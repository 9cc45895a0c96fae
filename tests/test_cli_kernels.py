"""`effllm bench --kernels` on a tiny shape: files, lines on what is missing, and options that do not fit together."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from effllm.autotune.bench import run
from effllm.cli import app
from tests.autotune.bench.fake import TINY


def call(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_writes_what_it_prints(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "sites", lambda name: TINY)
    files = ("--json", tmp_path / "k.json", "--png", tmp_path / "k.png")
    status, output = call("bench", "--kernels", "--bits", 4, "--rows", 1, "--rows", 33, "--op", "bipolar_linear", "--seconds", 0.01, *files)
    assert status == 0, output
    found = json.loads((tmp_path / "k.json").read_text())
    assert {r["name"] for r in found["rows"]} >= {"effllm w4a16", "torch-bf16", "torch-fp32"}
    assert found["settings"]["rows"] == [1, 33] and found["settings"]["group"] == 32
    for peer in found["peers"]:
        assert bool(peer["missing"]) != bool(peer["version"]) and (not peer["missing"] or f"{peer['name']} is missing: {peer['missing']}" in output)
    assert "a head is computed for the last token" in output and "cost model, all: Spearman" in output
    assert (tmp_path / "k.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("args", "code", "hint"),
    [
        (["--kernels", "demo"], "E-OPT-KERNELS", "MODEL"),
        (["--kernels", "--tokens", "5"], "E-OPT-KERNELS", "--tokens"),
        (["--kernels", "--model-shapes", "Llama3-8B"], "E-OPT-SHAPES", "did you mean 'Llama-3-8B'"),
        (["--kernels", "--op", "linear"], "E-OPT-OP", "bipolar_linear"),
        (["--kernels", "--peers", "torchaoo-int8"], "E-OPT-PEER", "did you mean 'torchao-int8'"),
        (["--kernels", "--group", "48"], "E-OPT-VALUE", "128"),
        (["--kernels", "--png", "no-such-folder/k.png"], "E-OPT-WRITE", "folder that exists"),
        (["--kernels", "--png", "k.svg"], "E-OPT-WRITE", ".png"),
        (["demo", "--rows", "1"], "E-OPT-KERNELS", "--rows"),
        (["demo", "--bits", "4", "--bits", "8"], "E-OPT-VALUE", "one width"),
        ([], "E-OPT-VALUE", "'MODEL'"),
    ],
)
def test_bad_input_names_the_next_step(args, code, hint):
    status, output = call("bench", *args)
    assert status == 2 and code in output and hint in output and "next step:" in output
