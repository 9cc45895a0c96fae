"""Every example runs on a tiny model and gives what it says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.hf.tiny import tiny_dir, tiny_text

FOLDER = Path(__file__).resolve().parent.parent.parent / "examples"
TESTED = {"compress_and_generate", "backend_only", "choose_a_recipe", "recover_quality", "prefill_many_prompts"}


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


def test_prefill_many_prompts(model):
    figures = load("prefill_many_prompts").main(model, 6, 3)  # raises where packed and padded answers differ
    assert figures["tokens"] < figures["padded_tokens"]
