"""Spearman's rank correlation against known values."""

from __future__ import annotations

import pytest

from effllm.autotune.bench.correlation import by_group, spearman
from effllm.autotune.space import ranks


def test_known_values() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 400]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # scipy.stats.spearmanr([1, 2, 2, 4], [1, 3, 2, 5]) = 0.9486832980505138
    assert spearman([1, 2, 2, 4], [1, 3, 2, 5]) == pytest.approx(0.9486832980505138)
    assert spearman([1, 1, 1], [1, 2, 3]) is None and spearman([1, 2], [1, 2]) is None


def test_ties_share_a_rank() -> None:
    assert ranks([5, 1, 5, 0]) == [2.5, 1, 2.5, 0]


def test_groups() -> None:
    row = {"name": "w4", "m": 1, "config": {"path": "registers"}}
    rows = [row | {"us": 2.0 * i, "predicted_us": float(i)} for i in (1, 2, 3)] + [row | {"us": 9.0}]
    found = by_group(rows)
    assert set(found) == {"all", "w4", "M=1", "path registers"}
    assert found["all"] == {"rows": 3, "spearman": pytest.approx(1), "measured_over_predicted": 2.0}
