"""The pass that joins gate and up projection: same numbers, which calls are left dense, idempotent, Phi's split."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

import effllm
from effllm import backend
from effllm.lowering import providers
from effllm.report import Report
from tests.activation.models import decoder, take_to_win, windows
from tests.hf.families import VOCAB, tiny
from tests.models import relative

OPTIONS = {"recipe": "dense", "inner": "eager", "max_slowdown": 1e9}
needs_kernels = pytest.mark.skipif(bool(providers.load("cpu")), reason="no compiled kernels: nothing to join for")


@pytest.fixture(autouse=True)
def profitable(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is skipped here must not depend on the processor: where its kernels are predicted to lose, they are taken to win."""
    take_to_win(monkeypatch)


def report_of(model: Any, *args: Tensor, **kwargs: Any) -> tuple[Tensor, Report]:
    torch._dynamo.reset()
    with torch.no_grad():
        out = torch.compile(model, fullgraph=True, backend="effllm", options=OPTIONS)(*args, **kwargs)
    return out, backend.last_report()


def codes(report: Report) -> dict[str, int]:
    found = next(p for p in report.passes if p.name == "sparse_gate")
    return dict(Counter(d.code for d in found.decisions))


@needs_kernels
@pytest.mark.parametrize("recipe", ["", "w4+"])
def test_joined_and_eager_agree(recipe: str) -> None:
    model = decoder()
    effllm.compress(model, f"{recipe}act:chess(sparsity=0.5)", calibration=windows())
    for rows, want in ((1, {"sparse": 6, "joined": 2}), (4, {"sparse": 6, "joined": 2}), (5, {"rows": 8})):
        ids = windows(1, rows, seed=9)
        got, report = report_of(model, ids)
        with torch.no_grad():
            assert relative(got, model(ids)) < 1e-5
        assert codes(report) == want, rows


@needs_kernels
def test_a_fused_gate_and_up_is_split() -> None:
    model = tiny("phi3")
    text = torch.randint(3, VOCAB, (140, 120), generator=torch.Generator().manual_seed(0))
    effllm.compress(model, "act:chess(sparsity=0.5)", calibration=text)
    ids = text[:1, :3]
    got, report = report_of(model, input_ids=ids, use_cache=False)
    with torch.no_grad():
        assert relative(got.logits, model(input_ids=ids, use_cache=False).logits) < 1e-5
    joined = [d for d in report.decisions if d.code == "joined"]
    assert len(joined) == 2 and all(d.config["split"] for d in joined)


def test_a_model_without_thresholds_is_reported() -> None:
    report = backend.explain(decoder(), windows(1, 2), "act:chess(sparsity=0.5)")
    assert codes(report) == {"calibration": 1}
    assert codes(backend.explain(decoder(), windows(1, 2), "dense")) == {}
