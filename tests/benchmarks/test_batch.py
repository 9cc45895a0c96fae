"""Ratios of batches are taken within a round."""

from __future__ import annotations

from benchmarks.batch import summary


def test_a_ratio_is_to_the_first_batch_of_the_same_round_and_recipe() -> None:
    rates = {("w4", 1): [100.0, 200.0, 50.0], ("w4", 4): [300.0, 500.0, 200.0], ("w8", 1): [10.0, 10.0, 10.0], ("w8", 4): [20.0, 30.0, 40.0]}
    one, four, _, other = summary(rates, 1)
    assert one["ratio"] == 1 and one["tok_s"] == 100
    assert four["ratio"] == 3 and four["ratio_range"] == "2.50..4.00" and four["tok_s_range"] == "200..500"
    assert other == {"recipe": "w8", "batch": 4, "tok_s": 30.0, "tok_s_range": "20..40", "ratio": 3.0, "ratio_range": "2.00..4.00"}
