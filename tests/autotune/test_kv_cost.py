"""The predicted context from which a compressed cache is faster."""

from __future__ import annotations

import pytest

from effllm.autotune import kv_cost, machines


@pytest.mark.parametrize("name", ["kivi", "gear", "mustafar"])
def test_the_crossover_is_where_the_curves_meet(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {**machines.cpu(), "bandwidth": 3e9}  # memory bounds the dense kernel
    monkeypatch.setattr(machines, "cpu", lambda: slow)

    def at(tokens: int) -> kv_cost.Prediction:
        return kv_cost.predict(name, tokens, 128, 32, 128, 4096.0, 1152.0)

    crossing = at(1).crossover
    assert crossing is not None and crossing > 128
    assert at(crossing).compressed <= at(crossing).dense
    assert at(crossing - 2).compressed > at(crossing - 2).dense
    assert at(16384).dense / at(16384).compressed > 1.3


def test_no_gain_has_no_crossover() -> None:
    assert kv_cost.predict("dense", 1000, 128, 8, 64, 1024.0, 1024.0).crossover is None


def test_formats_are_in_the_measured_order() -> None:
    """16,384 tokens, 32 query heads on 8 key heads of 128 (benchmarks/kv_attention.py)."""
    size = {"mustafar": 1536.0, "kivi": 1152.0, "gear": 928.0, "bfp": 1088.0}
    times = [kv_cost.predict(name, 16384, 128, 32, 128, 4096.0, size[name]).compressed for name in ("mustafar", "kivi", "gear", "bfp")]
    dense = kv_cost.predict("bfp", 16384, 128, 32, 128, 4096.0, 1088.0).dense
    assert times == sorted(times) and times[0] < dense < times[2]  # as fast as our dense kernel with KIVI, slower with GEAR
