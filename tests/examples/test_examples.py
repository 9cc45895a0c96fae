"""Every example runs on a tiny model and gives what it says."""

from __future__ import annotations

import importlib.util
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hf.tiny import tiny_dir, tiny_text

FOLDER = Path(__file__).resolve().parent.parent.parent / "examples"
TESTED = {"compress_and_generate", "backend_only", "choose_a_recipe", "recover_quality", "editor", "prefill_many_prompts"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_dir(tmp_path_factory.mktemp("examples") / "model"))


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_example_is_forgotten():
    assert {p.stem for p in FOLDER.glob("*.py")} == TESTED


def test_compress_and_generate(model, capsys):
    assert load("compress_and_generate").main(model, tokens=4)
    before, after = (float(part.split()[0]) for part in capsys.readouterr().out.splitlines()[0].split("->"))
    assert after <= before


@pytest.mark.slow
def test_backend_only(model):
    # 8-bit weights at group 32: rounding error of about 0.3 % per layer, through two layers and bf16
    assert 0 < load("backend_only").main(model) < 0.05


def test_choose_a_recipe(model):
    scores = load("choose_a_recipe").main(model, ("w8", "w4", "w2"), 1, tiny_text())
    assert scores["dense"]["kl"] == 0
    assert scores["w8"]["kl"] < scores["w4"]["kl"] < scores["w2"]["kl"]


def test_recover_quality(model):
    scores = load("recover_quality").main(model, "whitened(ratio=0.5)", 40, 32, 4, tiny_text())
    assert scores["dense"]["kl"] == 0
    assert scores["recovered"]["kl"] < 0.95 * scores["small"]["kl"]


def test_editor_in_a_terminal(model, tmp_path):
    """Typed into a real terminal: changes show their time beside a full reading, errors leave the file, `w` writes it."""
    file = tmp_path / "code.txt"
    file.write_text("".join(f"w{i} w{i + 1} w{i + 2}\n" for i in range(40)))
    master, slave = pty.openpty()
    command = [sys.executable, str(FOLDER / "editor.py"), str(file), "--model", model]
    env = os.environ | {"PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=subprocess.PIPE, env=env, text=True) as child:
        os.close(slave)
        os.write(master, b"i 3 w50 w51\nc 1 w9\nd 20\nd 99\ns\nr\nw\nq\n")
        shown = b""
        while True:
            try:
                shown += os.read(master, 4096)
            except OSError:  # the terminal is gone: the program has ended
                break
        assert child.wait(timeout=60) == 0, child.stderr.read()
    os.close(master)
    lines = [line for line in shown.decode().splitlines() if "tokens in" in line and "everything" in line]
    assert len(lines) == 3
    for line, total in zip(lines, (122, 120, 117), strict=True):
        encoded, tokens = re.match(r"(\d+) of (\d+) tokens in \d+ ms; reading everything took \d+ ms \(\d+ %\)", line).groups()
        assert int(tokens) == total and int(encoded) <= 3 + 16 + 64  # what was typed, and what is encoded again behind it and at the end
    assert b"no line '99'" in shown and b"next line:" in shown and b"read 117 tokens" in shown
    after = file.read_text().splitlines()
    assert after[:3] == ["w9", "w1 w2 w3", "w50 w51"] and len(after) == 40 and "w18 w19 w20" not in after


def test_prefill_many_prompts(model):
    figures = load("prefill_many_prompts").main(model, 6, 3)  # raises where packed and padded answers differ
    assert figures["tokens"] < figures["padded_tokens"]
