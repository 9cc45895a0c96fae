"""The choice of kernel and tiles: GEMV to dense as M grows, by the machine, and a store's entry before the model's."""

from __future__ import annotations

import time

import pytest
import torch

pytest.importorskip("triton")

from effllm.autotune import use
from effllm.autotune.gpus import CLASSES
from effllm.autotune.use import Choice
from effllm.kernels import triton as kernels
from effllm.kernels.triton import choose, launch
from effllm.kernels.triton.choose import TritonTuning
from effllm.kernels.triton.config import Tiles
from effllm.lowering.op import Problem

H200 = TritonTuning("cuda:90")


def problem(m: int | None, bits: int = 4, n: int = 8192, k: int = 8192, group: int = 32, act: str = "a16", dtype: torch.dtype = torch.bfloat16) -> Problem:
    return Problem("bipolar_linear_a8" if act == "a8" else "bipolar_linear", n, k, bits, group, False, act, m, dtype, "cuda")


def test_kinds_follow_the_number_of_rows() -> None:
    assert [H200.first(problem(m))["kind"] for m in (1, 16, 64, 4096)] == ["gemv", "gemm", "gemm", "dense"]
    assert H200.first(problem(4096, act="a8"))["kind"] == "gemm"
    assert H200.first(problem(None)) == H200.first(problem(1)), "dynamic rows count as one"


def test_split_k_fills_a_narrow_layer() -> None:
    narrow = problem(16, n=512)
    best = H200.first(narrow)
    assert best["kind"] == "gemm" and best["split"] >= 4
    programs = -(-narrow.n // best["bn"]) * best["split"]
    assert programs >= 4 * -(-narrow.n // 64), "8 tiles of 64 outputs would leave 124 of 132 multiprocessors idle"


def test_fewer_bytes_in_flight_cost_time() -> None:
    small, large = Tiles("gemv", 1, 32, 64, 1, 1, 1), Tiles("gemv", 1, 32, 256, 1, 4, 2)
    assert H200.predict(problem(1), small.config()).seconds > H200.predict(problem(1), large.config()).seconds


def test_time_grows_with_rows_and_bits() -> None:
    rows = [H200.ranked(problem(m))[0][0] for m in (1, 16, 128, 1024, 8192)]
    assert rows == sorted(rows)
    widths = [H200.ranked(problem(1, bits))[0][0] for bits in (1, 2, 4, 8)]
    assert widths == sorted(widths)


def test_the_first_choice_is_the_cheapest() -> None:
    for p in (problem(1), problem(16, 3), problem(500), problem(5, act="a8"), problem(2, dtype=torch.float32)):
        cheapest = min(H200.configs(p), key=lambda c: H200.predict(p, c).seconds)
        assert H200.predict(p, H200.first(p)).seconds == pytest.approx(H200.predict(p, cheapest).seconds)
        assert H200.legal(p, H200.first(p))


def test_crossovers_lie_where_the_model_says_and_differ_between_machines() -> None:
    layer = problem(None, n=4096, k=4096, group=128)
    found = {name: TritonTuning(name).crossovers(layer) for name in CLASSES}
    for name, changes in found.items():
        assert changes[0] == (1, "gemv") and changes[-1][1] == "dense"
        kinds = {"gemv": "gemv", "split-K": "gemm", "gemm": "gemm", "dense": "dense"}
        for m, path in changes:
            assert TritonTuning(name).first(layer.at(m))["kind"] == kinds[path]
        last = changes[-1][0]
        assert TritonTuning(name).first(layer.at(last - 1))["kind"] != "dense"
    assert found["cuda:90"] != found["cuda:80"] != found["cuda:89"] != found["cuda:90"]


@pytest.mark.parametrize("m", [*range(1, 9), 9, 17, 100, 129, 1000, 4097])
def test_planned_rows_cover_the_rows_closely(m: int) -> None:
    planned = choose.planned_rows(m)
    assert m <= planned <= 1.25 * m
    assert planned == m or m > 8
    assert choose.planned_rows(planned) == planned


def test_planned_rows_are_few() -> None:
    assert len({choose.planned_rows(m) for m in range(1, 4097)}) == 8 + 4 * 9


DTYPES = (torch.bfloat16, torch.bfloat16, torch.float16)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """Problems that a choice was asked for; the store's answer is a configuration that no model picks."""
    seen: list[Problem] = []

    def stored(provider: object, p: Problem) -> Choice:
        seen.append(p)
        return Choice(Tiles("gemv", 1, 32, 64, 1, 1, 1).config(), "exact", "")

    kernels.register()
    use.forget()
    monkeypatch.setattr(use, "choose", stored)
    yield seen
    use.forget()


def test_a_stored_configuration_runs_on_a_gpu_and_is_asked_for_once(asked: list[Problem]) -> None:
    gpu = torch.device("cuda", 0)
    for _ in range(3):
        assert launch.choice(1, 48, 96, 4, 32, False, *DTYPES, gpu) == Tiles("gemv", 1, 32, 64, 1, 1, 1)
    assert asked == [Problem("bipolar_linear", 48, 96, 4, 32, False, "a16", 1, torch.bfloat16, "cuda:0")]
    use.forget()
    launch.choice(1, 48, 96, 4, 32, False, *DTYPES, gpu)
    assert len(asked) == 2, "forgetting empties the cache before the launch too"
    launch.choice(1001, 48, 96, 4, 32, True, torch.int8, torch.float16, torch.float32, gpu)
    assert asked[-1] == Problem("bipolar_linear_a8", 48, 96, 4, 32, True, "a8", 1024, torch.float16, "cuda:0", torch.float32)


def test_cpu_tensors_never_reach_the_store(asked: list[Problem]) -> None:
    cpu = torch.device("cpu")
    assert launch.choice(1, 48, 96, 4, 32, False, *DTYPES, cpu) == Tiles.of(H200.first(problem(1, n=48, k=96)))
    assert not asked


def test_a_known_choice_costs_microseconds(asked: list[Problem]) -> None:
    arguments = (1, 48, 96, 4, 32, False, *DTYPES, torch.device("cuda", 0))
    launch.choice(*arguments)

    def once() -> float:
        start = time.perf_counter()
        for _ in range(1000):
            launch.choice(*arguments)
        return (time.perf_counter() - start) / 1000

    assert min(once() for _ in range(5)) < 5e-6
    assert len(asked) == 1


def test_without_a_gpu_the_model_answers_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    kernels.register()
    from effllm.lowering.op import OPS

    found = use.look_up(OPS["bipolar_linear"].providers["triton"], problem(1))
    assert (found.config, found.how) == (H200.first(problem(1)), "model") and "no GPU" in found.note
