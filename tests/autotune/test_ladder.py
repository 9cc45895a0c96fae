"""The lookup ladder: which rung answers, and what never answers."""

from __future__ import annotations

import math

import pytest

from effllm.autotune.key import BUCKETS
from effllm.autotune.ladder import Found
from effllm.autotune.measurement import Measurement
from effllm.autotune.store import Store
from effllm.lowering.op import YES, Verdict
from tests.autotune.made import HERE, OTHER_HARD, OTHER_SOFT, key, took


@pytest.fixture
def find(tmp_path):
    def found(*entries: Measurement, wanted=None, legal=None, at=HERE) -> Found | None:
        store = Store(tmp_path)
        for m in entries:
            store.append(m)
        return store.find(wanted or key(), legal, at)

    return found


def test_the_fastest_of_the_exact_entries(find):
    got = find(took(20.0, 20), took(10.0, 10), took(30.0, 30))
    assert (got.config, got.how, got.stale) == ({"bn": 10}, "exact", False)
    assert got.seconds == pytest.approx(10e-6) and got.note.startswith("exact: 10.0 us measured ")


def test_a_newer_slower_result_replaces_an_older_faster_one(find):
    assert find(took(10.0, 10), took(15.0, 20), took(40.0, 10)).config == {"bn": 20}


@pytest.mark.parametrize("status", ["wrong", "error", "timeout", "oom"])
def test_a_failed_configuration_is_never_returned(find, status):
    failed = took(None, 10, status=status)
    assert find(failed) is None
    # an older success of the configuration does not count, from whatever rung
    assert find(took(1.0, 10), took(1.0, 10, at=OTHER_SOFT), took(1.0, 10, of=key(2)), took(1.0, 10, of=key(n=600)), failed) is None


def test_a_stale_failure_bars_the_near_rungs_and_yields_to_a_fresh_success(find):
    assert find(took(None, 10, at=OTHER_SOFT, status="wrong"), took(1.0, 10, of=key(2))) is None
    assert find(took(5.0, 10)).how == "exact"


def test_other_software_gives_a_stale_seed(find):
    got = find(took(10.0, 10, at=OTHER_SOFT))
    assert (got.how, got.stale) == ("soft-stale", True)
    assert "stale: torch was 2.12.0, is 2.13.0" in got.note
    got = find(took(90.0, 90))
    assert (got.config, got.how) == ({"bn": 90}, "exact")


def test_two_installations_keep_their_own_results(find):
    find(took(10.0, 10), took(50.0, 10, at=OTHER_SOFT), took(20.0, 20, at=OTHER_SOFT))
    assert find(at=HERE).config == {"bn": 10} and find(at=OTHER_SOFT).config == {"bn": 20}


@pytest.mark.parametrize("apart", [{"source": "bbbb"}, {"provider": "cpu-avx2"}, {"align": 4}, {"bits": 3}, {"dtype": "float16"}, {"bias": True}])
def test_other_code_or_another_problem_is_never_used(find, apart):
    assert find(took(1.0, of=key(**apart)), took(1.0, of=key(2, **apart)), took(1.0, of=key(n=600, **apart))) is None


def test_other_hardware_is_never_used(find):
    assert find(took(1.0, at=OTHER_HARD), took(1.0, of=key(2), at=OTHER_HARD), took(1.0, of=key(n=600), at=OTHER_HARD)) is None


@pytest.mark.parametrize("wanted", BUCKETS)
def test_the_nearest_bucket_in_log_space(find, wanted):
    at = (1, 4, 256)
    got = find(*(took(10.0 + m, m, of=key(m)) for m in at), wanted=key(wanted))
    best = min(at, key=lambda m: (abs(math.log2(m / wanted)), -m))
    assert got.config == {"bn": best} and got.how == ("exact" if wanted in at else "near M bucket")
    if wanted not in at:
        assert f"m_bucket={best} for {wanted}" in got.note


def test_the_nearest_shape_in_log_space(find):
    # 100 is nearer to 600 by difference, 1150 by ratio
    far = took(1.0, 1, of=key(n=100)), took(2.0, 3, of=key(n=1150))
    assert find(*far, wanted=key(n=600)).config == {"bn": 3}
    got = find(took(5.0, 2, of=key(n=700, k=1500)), wanted=key(n=600))
    assert (got.config, got.how) == ({"bn": 2}, "near shape")
    assert "n=700 for 600" in got.note and "k=1500 for 1536" in got.note


def test_a_shape_at_another_bucket_is_no_neighbour(find):
    assert find(took(1.0, of=key(2, n=600))) is None


def test_the_rungs_in_order(find):
    shape, bucket, stale, exact = took(1.0, 1, of=key(n=600)), took(2.0, 2, of=key(2)), took(3.0, 3, at=OTHER_SOFT), took(4.0, 4)
    got = [find(m).how for m in (shape, bucket, stale, exact)]
    assert got == ["near shape", "near M bucket", "soft-stale", "exact"]


def test_near_and_stale_is_flagged(find):
    got = find(took(1.0, of=key(2), at=OTHER_SOFT))
    assert (got.how, got.stale) == ("near M bucket", True)
    assert find(took(9.0, 9, of=key(2))).config == {"bn": 9}, "fresh before stale within a bucket"


def test_illegal_configurations_are_passed_over_with_a_note(find):
    def legal(config) -> Verdict:
        return YES if config["bn"] != 10 else Verdict(False, "needs 300 KB of shared memory")

    got = find(took(1.0, 10), took(2.0, 20), legal=legal)
    assert got.config == {"bn": 20} and "1 faster or nearer no longer legal" in got.note and "needs 300 KB" in got.note
    assert find(legal=lambda config: Verdict(False, "no")) is None
