"""The configurations: every problem has some, what is refused is what is never yielded, and the reasons say why."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")

from effllm.autotune import gpus
from effllm.autotune.gpus import CLASSES, DEFAULT
from effllm.kernels.triton import cost, space
from effllm.kernels.triton.choose import TritonTuning
from effllm.kernels.triton.config import Tiles
from effllm.lowering.op import Problem

GROUPS = (0, 16, 32, 64, 128)
H200 = gpus.constants(DEFAULT)


def problem(m: int, bits: int = 4, n: int = 4096, k: int = 4096, group: int = 32, act: str = "a16", dtype: torch.dtype = torch.bfloat16) -> Problem:
    return Problem("bipolar_linear", n, k, bits, group, False, act, m, dtype, "cuda")


@pytest.mark.parametrize(("act", "dtype"), [("a8", torch.bfloat16), ("a16", torch.bfloat16), ("a16", torch.float32)])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_problem_has_a_configuration_on_every_machine(bits: int, act: str, dtype: torch.dtype) -> None:
    for group, (n, k), gpu in itertools.product(GROUPS, ((1, 1), (33, 70), (4096, 4096)), CLASSES.values()):
        for m in (1, 3, 16, 129, 1000):
            found = list(space.candidates(problem(m, bits, n, k, group, act, dtype), gpus.constants(gpu)))
            assert found and len(found) == len(set(found))
            for c in found:
                assert c.bk % 32 == 0 and c.kind in ("gemv", "gemm", "dense")
                if c.kind == "gemv":
                    assert c.bm in (1, 2, 4) and c.bm >= m
                if c.kind == "gemm":
                    assert c.bm >= 16 and (not group or group % c.bk == 0 or c.bk % group == 0)
                    assert c.split == 1 or dtype != torch.float32 or act == "a8"
                assert c.kind != "dense" or act != "a8"


GRID = [
    Tiles(kind, bm, bn, bk, split, warps, stages)
    for kind in ("gemv", "gemm", "dense")
    for bm, bn, bk in itertools.product((1, 2, 4, 16, 32, 64, 128, 256), (32, 64, 128, 256), (32, 64, 128, 512))
    for split, warps, stages in itertools.product((1, 2, 3, 32), (1, 4, 8), (1, 2, 3))
]


@pytest.mark.parametrize("name", ["cuda:90", "cuda:86", "hip:gfx942"])
@pytest.mark.parametrize(
    "of", [problem(1), problem(3, 7), problem(17, group=16), problem(200, 8, group=0, act="a8"), problem(2, k=70, dtype=torch.float32)], ids=str
)
def test_refused_is_what_is_never_yielded(of: Problem, name: str) -> None:
    machine = gpus.constants(CLASSES[name])
    allowed = set(space.candidates(of, machine))
    assert all(not space.refusal(of, c.config(), machine) for c in allowed)
    for c in GRID:
        assert bool(space.refusal(of, c.config(), machine)) == (c not in allowed), c


def test_shared_memory_of_the_machine_bounds_the_tiles() -> None:
    big = Tiles("gemm", 64, 128, 128, 1, 8, 3)
    of = problem(64, 8, group=0)
    assert TritonTuning("cuda:90").legal(of, big.config())
    refused = TritonTuning("hip:gfx942").legal(of, big.config())
    assert not refused and "129 KiB of shared memory, there are 64" in refused.reason
    for name in ("hip:gfx942", "cuda:86"):
        for c in space.candidates(of, gpus.constants(CLASSES[name])):
            if c.kind == "gemm":
                assert cost.shared_bytes(of, c.bm, c.bn, c.bk, c.stages) < CLASSES[name].smem


@pytest.mark.parametrize(
    ("of", "config", "reason"),
    [
        (problem(1), {}, "no configuration"),
        (problem(1), Tiles("gemv").config() | {"bn": 64.0}, "no configuration"),
        (problem(1), Tiles("gemv").config() | {"kind": "conv"}, "no configuration"),
        (problem(1), Tiles("gemv").config() | {"threads": 2}, "no configuration"),
        (problem(5), Tiles("gemv", 4, 64, 256).config(), "takes 4 rows"),
        (problem(4), Tiles("gemv", 1, 64, 256).config(), "tiles of 1 rows for 4"),
        (problem(16, act="a8"), Tiles("dense").config(), "int8 activations"),
        (problem(16, group=16), Tiles("gemm", 16, 64, 128, 1, 4, 2).config(), "two groups of 16"),
        (problem(200), Tiles("gemm", 64, 64, 32, 2, 4, 2).config(), "split-K with 200 rows"),
        (problem(16, k=70), Tiles("gemm", 16, 64, 32, 4, 4, 2).config(), "4 splits of 70 columns"),
    ],
)
def test_refusals_say_why(of: Problem, config: dict[str, object], reason: str) -> None:
    assert reason in space.refusal(of, config, H200)
