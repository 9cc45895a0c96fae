"""The choice of kernel and tiles: legal, never below the roofline, GEMV to dense as M grows, measured entries first."""

from __future__ import annotations

import pytest

from effllm.kernels.triton import choose
from effllm.kernels.triton.choose import Config, Shape
from effllm.kernels.triton.machine import DEFAULT, MACHINES, by_class

GROUPS = (0, 16, 32, 64, 128)


def shape(m: int, bits: int = 4, n: int = 8192, k: int = 8192, group: int = 32, act: int = 2) -> Shape:
    return Shape(m, n, k, bits, group, False, act)


@pytest.mark.parametrize("act", [1, 2, 4])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_problem_has_a_legal_configuration(bits: int, act: int) -> None:
    for group in GROUPS:
        for m in (1, 2, 3, 5, 16, 17, 129, 1000):
            for n, k in ((1, 1), (33, 70), (4096, 4096)):
                found = list(choose.candidates(shape(m, bits, n, k, group, act)))
                assert found
                for c in found:
                    assert c.bk % 32 == 0 and c.kind in ("gemv", "gemm", "dense")
                    if c.kind == "gemv":
                        assert c.bm in (1, 2, 4) and c.bm >= m
                    if c.kind == "gemm":
                        assert c.bm >= 16 and (not group or group % c.bk == 0 or c.bk % group == 0)
                        assert c.split == 1 or act != 4
                    assert c.kind != "dense" or act != 1


@pytest.mark.parametrize("name", MACHINES)
def test_no_prediction_beats_the_roofline(name: str) -> None:
    machine = MACHINES[name]
    for m in (1, 16, 256):
        for bits in (1, 4, 8):
            problem = shape(m, bits)
            for c in choose.candidates(problem):
                assert choose.seconds(problem, c, machine) >= problem.weight_bytes / machine.bandwidth + machine.launch


def test_kinds_follow_the_number_of_rows() -> None:
    kinds = [choose.choose(shape(m), DEFAULT).kind for m in (1, 16, 64, 4096)]
    assert kinds == ["gemv", "gemm", "gemm", "dense"]
    assert choose.choose(shape(4096, act=1), DEFAULT).kind == "gemm"


def test_split_k_fills_a_narrow_layer() -> None:
    narrow = shape(16, n=512)
    best = choose.choose(narrow, DEFAULT)
    assert best.kind == "gemm" and best.split >= 4
    programs = -(-narrow.n // best.bn) * best.split
    assert programs >= 4 * -(-narrow.n // 64), "8 tiles of 64 outputs would leave 124 of 132 multiprocessors idle"


def test_fewer_bytes_in_flight_cost_time() -> None:
    problem = shape(1)
    small, large = Config("gemv", 1, 32, 64, 1, 1, 1), Config("gemv", 1, 32, 256, 1, 4, 2)
    assert choose.seconds(problem, small, MACHINES["cuda:90"]) > choose.seconds(problem, large, MACHINES["cuda:90"])


def test_time_grows_with_rows_and_bits() -> None:
    def best(m: int, bits: int) -> float:
        return choose.ranked(shape(m, bits), DEFAULT)[0][0]

    rows = [best(m, 4) for m in (1, 16, 128, 1024, 8192)]
    assert rows == sorted(rows)
    widths = [best(1, bits) for bits in (1, 2, 4, 8)]
    assert widths == sorted(widths)


def test_a_measured_entry_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Config("gemv", 1, 128, 64, 4, 2, 1)
    monkeypatch.setitem(choose.TUNED, ("cuda:90", 1, 48, 96, 4, 32, 2), measured)
    assert choose.choose(shape(1, n=48, k=96), DEFAULT, "cuda:90") == measured


def test_unknown_chips_get_the_nearest_older_class() -> None:
    assert by_class("cuda:120") is MACHINES["cuda:100"]
    assert by_class("cuda:87") is MACHINES["cuda:86"]
    assert by_class("cuda:75") is DEFAULT and by_class("hip:gfx1100") is DEFAULT
