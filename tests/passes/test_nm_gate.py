"""The cost gate on N:M sites: where the model predicts a loss the linear stays dense, and the Decision carries the figures."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import effllm
from effllm.autotune import dense, machines
from effllm.kernels.cpu import build
from effllm.lowering import nm_linear, providers
from effllm.lowering.op import OPS, Problem

BF16 = torch.bfloat16
# a machine with one thread: rates per second, nothing read from this one
MACHINE = {"bandwidth": 20e9, "single": 20e9, "cores": 1.0, "issue": 6e9, "call": 2e-6, "wake": 5e-6, "product": 50e9, "product32": 20e9}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The cost model's machine, which the test may change."""
    known = dict(machines.cpu()) | MACHINE
    monkeypatch.setattr(machines, "cpu", lambda: known)
    return known


def linear(n: int = 256, k: int = 512) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    return nn.Linear(k, n, bias=False).to(BF16), (torch.randn(1, k).to(BF16),)


@pytest.mark.parametrize("recipe", ["nm(pattern=2:4, solver=magnitude)", "nm(pattern=6:8, solver=magnitude)", "nm(pattern=4:8, solver=magnitude, bits=8)"])
def test_a_predicted_loss_is_refused_with_its_figure(recipe: str, machine: dict[str, float]) -> None:
    """Slow instructions make any N:M kernel lose to a dense product that only reads; fast ones make it win."""
    model, inputs = linear()
    found = {}
    for issue in (1e6, 1e15):
        machine["issue"] = issue
        with torch.no_grad():
            (found[issue],) = [d for d in effllm.explain(model, *inputs, recipe=recipe).decisions if d.kernel]
    slow, fast = found[1e6], found[1e15]
    assert (slow.action, slow.code) == ("kept", "slower")
    assert slow.time_before is not None and slow.time_after is not None and slow.time_after > 1.25 * slow.time_before
    assert slow.reason == f"predicted {slow.time_after / slow.time_before:.2f}x the time of the dense linear at 1 rows"
    assert fast.action == "applied" and fast.time_after is not None and fast.time_before is not None and fast.time_after < 1.25 * fast.time_before


CASES = [("nm_linear", 2, 4, 0, 0), ("nm_linear", 6, 8, 0, 0), ("nm_bipolar_linear", 4, 8, 8, 0), ("nm_bipolar_linear", 6, 8, 8, 0)]
CASES += [("armor_linear", 2, 4, 0, 64)]


@pytest.mark.parametrize(("op", "keep", "of", "bits", "block"), CASES)
def test_every_op_has_a_prediction_to_be_judged_by(op: str, keep: int, of: int, bits: int, block: int, machine: dict[str, float]) -> None:
    """All CPU providers but the reference predict; a prediction is never below what reading the weight takes, and grows with the pattern's bytes."""
    asked = _problem(op, keep, of, bits, block)
    providers.load("cpu")
    judged = 0
    for provider in OPS[op].providers.values():
        if provider.device != "cpu" or not provider.supports(asked):
            continue
        assert provider.tuning is not None
        figure = provider.tuning.predict(asked, provider.tuning.first(asked))
        assert figure.seconds >= figure.nbytes / machine["bandwidth"]
        judged += 1
    assert judged, "a portable kernel takes everything"
    assert dense.seconds(asked) > 2 * 4096 * 4096 / machine["bandwidth"]


def _problem(op: str, keep: int, of: int, bits: int, block: int) -> Problem:
    stored = None if bits else BF16
    return nm_linear.problem(op, 4096, 4096, keep, of, values=stored, bits=bits, group=64 if bits else 0, block=block)


@pytest.mark.skipif(not {"avx512_bf16", "avx512_vbmi2"} <= build.cpu_flags(), reason="needs AVX-512 with VBMI2")
def test_codes_in_whole_words_are_predicted_cheaper() -> None:
    """Groups of 4:8 codes fill whole words of columns; those of 6:8 straddle them and are decoded first. Past a few rows both are decoded."""
    tuning = OPS["nm_bipolar_linear"].providers["cpu-avx512"].tuning
    assert tuning is not None
    whole, split = (nm_linear.problem("nm_bipolar_linear", 4096, 4096, keep, of, bits=8, group=64) for keep, of in ((4, 8), (6, 8)))
    config = {"path": "registers", "threads": 1}
    per_column = {m: [tuning.predict(p.at(m), config).instructions / (m * 4096 * 4096) for p in (whole, split)] for m in (1, 8)}
    assert per_column[1][0] < 0.8 * per_column[1][1] and per_column[8][0] > 0.7 * per_column[8][1]
