"""The harness on tiny shapes: what is right is timed and compared, what is wrong, missing or broken is named and not timed."""

from __future__ import annotations

import json

import pytest

from effllm.autotune.bench import clock, plot, run
from effllm.autotune.bench.candidate import copies
from effllm.errors import OptionError
from tests.autotune.bench.fake import TINY, Fake


@pytest.fixture
def tiny(monkeypatch):
    """A function (peers) -> result of a run over the tiny shapes."""
    monkeypatch.setattr(run, "sites", lambda name: TINY)
    monkeypatch.setattr(run, "last_level_cache", lambda device: 1 << 10)
    monkeypatch.setattr("effllm.autotune.bench.candidate.COLD", 1 << 12)
    monkeypatch.setattr("effllm.autotune.bench.ours.copies", lambda nbytes, cache: 3)
    monkeypatch.setattr("effllm.autotune.peers.dense.copies", lambda nbytes, cache: 3)
    monkeypatch.setattr(run.roofs, "measure", lambda device: {"read_bandwidth_gb_s": 10.0, "bf16_gflops": 50.0, "fp32_gflops": 30.0, "constants": {}})
    real = run.peers.chosen

    def go(*extra: Fake, **plan: object):
        monkeypatch.setattr(run.peers, "chosen", lambda names: [*real(["none"]), *extra])
        monkeypatch.setattr(clock, "PAUSE", 0)
        return run.run(run.Plan(**({"rows": (1, 3), "bits": (4,), "seconds": 0.01} | plan)))

    return go


def rows(result, **want):
    return [r for r in result["rows"] if all(r[k] == v for k, v in want.items())]


def test_right_kernels_are_timed_and_compared(tiny):
    result = tiny(Fake("right"))
    assert {r["status"] for r in result["rows"]} == {"timed"}
    for r in rows(result, kind="effllm"):
        low, high = r["us_quartiles"]
        assert 0 < low <= r["us"] <= high and r["samples"] >= clock.LEAST
        assert r["gb_s"] == pytest.approx(r["packed_bytes"] / r["us"] / 1e3)
        assert r["bits_per_weight"] == pytest.approx(4.5)
        rivals = {x["name"]: x["us"] for x in result["rows"] if x["kind"] != "effllm" and (x["n"], x["m"]) == (r["n"], r["m"])}
        assert r["best_peer"] == min(rivals, key=rivals.get)
        assert r["times_best_peer"] == pytest.approx(min(rivals.values()) / r["us"])
        assert r["times_torch_bf16"] == pytest.approx(rivals["torch-bf16"] / r["us"])
        if r["predicted_us"] is not None:
            assert r["of_bound"] == pytest.approx(r["bound_us"] / r["us"]) and r["bound_us"] <= r["predicted_us"]
    assert json.loads(json.dumps(result))["rows"]


def test_a_wrong_peer_is_not_timed(tiny):
    wrong = Fake("wrong", factor=1.05)
    result = tiny(wrong)
    found = rows(result, name="wrong")
    assert len(found) == 4 and all(r["status"] == "wrong" and "us" not in r and r["error"] == pytest.approx(0.05, rel=0.1) for r in found)
    assert [p.timed for p in wrong.made] == [2, 2]  # one check for each number of rows, and no burst
    assert all(r["best_peer"] != "wrong" for r in rows(result, kind="effllm"))


def test_a_missing_peer_is_named_with_the_way_to_install_it(tiny):
    result = tiny(Fake("absent", package="no_such_package_here"))
    line = next(p for p in result["peers"] if p["name"] == "absent")
    assert line == {"name": "absent", "version": None, "missing": "no_such_package_here is not installed", "install": "pip install fake"}
    assert not rows(result, name="absent")


def test_a_peer_that_raises_or_refuses_is_named(tiny):
    result = tiny(Fake("broken", error=RuntimeError("no kernel\nfor you")), Fake("picky"))
    reasons = {(s["name"], s["n"]): s["reason"] for s in result["skipped"] if "m" not in s}
    assert reasons == {("broken", 48): "RuntimeError: no kernel", ("broken", 80): "RuntimeError: no kernel", ("picky", 80): "N is odd for me"}
    assert {r["n"] for r in rows(result, name="picky")} == {48}


def test_many_rows_of_a_head_are_left_out_and_said_so(tiny):
    result = tiny(rows=(17,))
    assert {r["n"] for r in result["rows"]} == {48}
    assert any(s["n"] == 80 and s.get("m") == 17 and "last token" in s["reason"] for s in result["skipped"])


def test_a_kernel_of_ours_that_mixes_up_rows_is_found_wrong(tiny, monkeypatch):
    stored = run.ours.Kernel.stored
    monkeypatch.setattr(run.ours.Kernel, "stored", lambda self, index: stored(self, index).roll(1, 0))
    result = tiny()
    assert {r["status"] for r in rows(result, kind="effllm")} == {"wrong"}


@pytest.mark.parametrize(
    ("plan", "code"),
    [({"models": ["nope"]}, "E-OPT-SHAPES"), ({"ops": ["bipolar_liner"]}, "E-OPT-OP"), ({"peers": ["torhao"]}, "E-OPT-PEER")],
)
def test_unknown_names_end_the_run_before_it_starts(plan, code):
    with pytest.raises(OptionError) as caught:
        run.run(run.Plan(**plan), lambda what, share: pytest.fail("started"))
    assert caught.value.code == code


def test_copies_exceed_the_cache():
    assert copies(1 << 20, 32 << 20) == 64 and copies(1 << 30, 32 << 20) == 1
    assert copies(1000, 1 << 10) * 1000 >= 64 << 20


def test_plots_are_written(tiny, tmp_path):
    result = tiny(Fake("right"))
    plot.png(result, tmp_path / "k.png")
    assert (tmp_path / "k.png").read_bytes()[:4] == b"\x89PNG"
    empty = result | {"rows": [], "correlation": {}}
    plot.png(empty, tmp_path / "none.png")
    assert (tmp_path / "none.png").stat().st_size > 1000


def test_the_result_so_far_is_given_after_every_shape(tiny, monkeypatch):
    seen = []
    real = run.run
    monkeypatch.setattr(run, "run", lambda plan: real(plan, keep=lambda so_far: seen.append({r["n"] for r in so_far["rows"]})))
    tiny()
    assert seen == [{48}, {48, 80}]


def test_a_stopped_run_goes_on_and_other_settings_are_refused(tiny, monkeypatch):
    whole = tiny()
    calls = []
    real = run.time_one
    monkeypatch.setattr(run, "time_one", lambda built, at, dense, plan: calls.append(at) or real(built, at, dense, plan))
    plan = run.Plan(rows=(1, 3), bits=(4,), seconds=0.01)
    part = whole | {"settings": run.settings(plan), "rows": [r for r in whole["rows"] if r["layers"] == whole["rows"][0]["layers"]]}
    again = run.run(plan, before=part)
    assert len(again["rows"]) == len(whole["rows"]) and all(c["layers"] != whole["rows"][0]["layers"] for c in calls)
    assert sum("resumed" in r for r in again["rows"]) == len(part["rows"])
    with pytest.raises(OptionError, match="other settings: seconds_per_case"):
        run.run(run.Plan(rows=(1, 3), bits=(4,), seconds=0.02), before=part)


def test_work_beside_the_run_is_told(tiny, monkeypatch):
    from effllm.commands_kernels import lines

    monkeypatch.setattr(run.machine.OtherLoad, "cores", lambda self: 0.5)
    crowded = [line for line in lines(tiny(rows=(1,))) if line.startswith("not to be trusted")]
    assert crowded == ["not to be trusted, other work took processor time: 48x64 M=1 (0.50 cores), 80x64 M=1 (0.50 cores)"]
    monkeypatch.setattr(run.machine.OtherLoad, "cores", lambda self: None)
    assert not any(line.startswith("not to be trusted") for line in lines(tiny(rows=(1,))))
