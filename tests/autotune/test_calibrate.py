"""Machine constants: measured, kept per machine, read back, and refused where they would lie."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from effllm.autotune import calibrate, machines
from effllm.autotune.cost import M, Model, N, crossovers
from effllm.errors import KernelError, TuneError
from effllm.kernels.cpu.nm_choose import thresholds
from effllm.lowering import nm_linear, providers
from effllm.lowering.op import Problem


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # kernels stay where they are: only the constants go elsewhere
    monkeypatch.setattr(machines, "path_of", lambda environment: tmp_path / "machines" / "here.json")
    machines._stored.cache_clear()
    yield
    machines._stored.cache_clear()


def test_constants_are_measured_in_time_and_used() -> None:
    if providers.select(Problem("bipolar_linear_a8", 16, 32, 8, 32, False, "a8", 1))[0].tuning is None:
        with pytest.raises(TuneError, match="E-TUN-KERNEL"):
            calibrate.measure(allow_load=True)
        return
    assert not machines.is_calibrated()
    start = time.process_time()  # of all threads: a machine that is busy with something else is not slower by this clock
    found = calibrate.measure(allow_load=True)
    assert (time.process_time() - start) / torch.get_num_threads() < 30
    assert set(found) == set(machines.NAMES)
    assert all(v > 0 for name, v in found.items() if name != "wake") and found["wake"] >= 0
    # a vector unit issues between a tenth of an instruction and ten a cycle
    assert 1e8 < found["issue"] < 5e10 and found["bandwidth"] >= found["single"] > 5e8 and found["call"] < 1e-3
    machines.keep(found)
    assert machines.is_calibrated()
    assert {k: machines.cpu()[k] for k in machines.NAMES} == pytest.approx(found)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"constants": {}}', '{"constants": {"bandwidth": "x"}}'])
def test_a_damaged_file_counts_as_not_calibrated(tmp_path: Path, text: str) -> None:
    (tmp_path / "machines").mkdir()
    (tmp_path / "machines" / "here.json").write_text(text)
    assert not machines.is_calibrated() and machines.cpu()["issue"] == machines.DEFAULTS["issue"]


def test_an_unwritable_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "machines").write_text("in the way")
    with pytest.raises(KernelError, match="E-KRN-CACHE"):
        machines.keep(dict(machines.DEFAULTS))


def test_the_bandwidth_is_no_lower_than_what_a_kernel_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound below what kernels reach is no bound: the faster of a sum and a kernel counts, for one thread and for all."""
    if providers.select(Problem("bipolar_linear_a8", 16, 32, 8, 32, False, "a8", 1))[0].tuning is None:
        pytest.skip("no compiled kernels")
    monkeypatch.setattr(calibrate, "measure_bandwidth", lambda threads: 9.0 * threads)
    monkeypatch.setattr(calibrate, "_reads", lambda provider, threads: {1: 11e9}.get(threads, 14e9))
    monkeypatch.setattr(calibrate, "_product", lambda *_: 1e11)
    monkeypatch.setattr(calibrate, "_linear", lambda *_: 1e-5)
    found = calibrate.measure(allow_load=True)
    threads = torch.get_num_threads()
    assert found["single"] == 11e9 and found["bandwidth"] == (11e9 if threads == 1 else max(14e9, 9e9 * threads))


def test_load_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "measure_bandwidth", lambda *_: 10.0)
    monkeypatch.setattr(calibrate, "_reads", lambda *_: 1e10)
    monkeypatch.setattr(calibrate, "_product", lambda *_: 1e11)
    monkeypatch.setattr(calibrate, "_linear", lambda *_: 1e-5)
    monkeypatch.setattr(calibrate.OtherLoad, "cores", lambda self: 1.7)
    if providers.select(Problem("bipolar_linear_a8", 16, 32, 8, 32, False, "a8", 1))[0].tuning is None:
        pytest.skip("no compiled kernels")
    with pytest.raises(TuneError, match=r"1\.7 cores"):
        calibrate.measure()


def test_faster_products_move_the_crossover(tmp_path: Path) -> None:
    problem = nm_linear.problem("nm_linear", 1024, 1024, 2, 4, dtype=torch.bfloat16, values=torch.bfloat16)
    found = {}
    for factor in (0.3, 3.0):
        machines.keep(machines.DEFAULTS | {"product": factor * machines.DEFAULTS["product"]})
        thresholds.cache_clear()
        found[factor] = thresholds(problem, "avx512", False)["expand_from"]
    thresholds.cache_clear()
    assert 0 < found[3.0] < (found[0.3] or 1 << 40)


def test_crossovers_find_every_change() -> None:
    steps = [(1, "a"), (5, "b"), (97, "c"), (1000, "d")]

    def best(m: int) -> str:
        return [name for first, name in steps if m >= first][-1]

    assert crossovers(best) == steps
    assert crossovers(lambda m: "same") == [(1, "same")]


def test_a_model_names_the_symbol_it_lacks() -> None:
    model = Model(M * N, 2 * M * N, M, M * N / 100, M)
    assert model.symbols == ("m", "n") and model.evaluate({"m": 3, "n": 5}).nbytes == 15
    with pytest.raises(KeyError, match="n"):
        model.evaluate({"m": 3})


def test_kept_constants_name_the_machine(tmp_path: Path) -> None:
    machines.keep(dict(machines.DEFAULTS))
    stored = json.loads((tmp_path / "machines" / "here.json").read_text())
    assert stored["constants"] == machines.DEFAULTS and stored["environment"]
