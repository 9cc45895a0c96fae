"""Verification: against the stored weight, loosely against the dense one, sampled where the weight is large; NaN never passes."""

from __future__ import annotations

import math

import pytest
import torch

from effllm.autotune.bench import verify
from effllm.autotune.bench.verify import sample
from tests.autotune.bench.fake import Product

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
W = torch.randn(48, 64, generator=torch.Generator().manual_seed(4))


def made(**change: object) -> Product:
    found = Product([W], W.numel() * 4)
    for key, value in change.items():
        setattr(found, key, value)
    found.load(X)
    return found


def test_right_passes_and_wrong_does_not() -> None:
    assert verify.verify(made(), X, None).refused == ""
    result = verify.verify(made(factor=1.05), X, None)
    assert result.error == pytest.approx(0.05, rel=0.01) and "stored weight" in result.refused


def test_nan_and_infinity_are_refused() -> None:
    result = verify.verify(made(factor=math.nan), X, None)
    assert result.refused and math.isnan(result.error)


def test_not_finite_outside_of_the_sample_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "sample", lambda n, count, device: torch.tensor([0, 1]))
    candidate = made()
    candidate.weights = [W.clone().index_fill(0, torch.tensor(7), math.inf)]
    assert verify.verify(candidate, X, None).refused == "its output is not finite"


def test_without_a_stored_weight_the_dense_one_bounds_it() -> None:
    loose = {"stored": lambda index: None, "quality": 0.1, "factor": 1.05}
    result = verify.verify(made(**loose), X, W)
    assert result.refused == "" and result.against == "dense weight"
    assert verify.verify(made(**loose | {"factor": 1.2}), X, W).refused
    assert "no dense weight" in verify.verify(made(**loose), X, None).refused


def test_sample_holds_the_ends() -> None:
    found = sample(1000, 50, "cpu")
    assert len(found) == 50 == len(set(found.tolist())) and {0, 999} <= set(found.tolist())
    assert sample(10, 50, "cpu").tolist() == list(range(10))
