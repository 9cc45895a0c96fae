"""Attention by segments in Triton: numbers in the interpreter, compilation for GPUs that are not here, and the provider's verdicts."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")
import torch

from effllm.kernels.triton import aot, segments, segments_launch
from effllm.lowering.op import OPS, Problem
from tests.kernels.triton.segments_cases import T, cases

WORKER = "segments_cases.py"

# beyond twice plain torch's error: fp32 sums of at most 80 terms; in fp16 the rounding of probabilities before the second product, 2^-11
FLOOR = {"float32": 1e-6, "bfloat16": 1e-6, "float16": 5e-4}


@pytest.mark.parametrize("case", cases(), ids=lambda c: c.name)
def test_error_is_that_of_plain_torch(results: dict[str, dict[str, Any]], case: Any) -> None:
    got = results[case.name]
    assert got["shape"] == [1, T, case.heads, case.value] and got["zeros"]
    assert got["error"] <= 2 * got["plain"] + FLOOR[case.dtype]  # NaN fails too


SIZES = dict.fromkeys(("S", "H", "qh", "qt", "kh", "kt", "vh", "vt", "window"), "i32") | {"scale": "fp32", "softcap": "fp32"}
SHAPES = [(64, 3, True, False), (64, 3, False, False), (128, 4, False, False), (128, 8, True, True), (256, 2, False, True)]
ALIGNED = ("q", "k", "v", "table", "out", "qh", "qt", "kh", "kt", "vh", "vt")


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize(("size", "repeat", "few", "window"), SHAPES)
def test_compiles_without_spills(target: str, size: int, repeat: int, few: bool, window: bool) -> None:
    how = segments_launch.tiles(8 if few else 1024, 8, repeat, size)
    kind = {"q": "*bf16", "k": "*bf16", "v": "*bf16", "table": "*i32", "out": "*bf16"} | SIZES
    constants = {
        "R": repeat, "D": size, "DV": size, "DP": size, "DVP": size, "SP": 8, "WINDOW": window, "CAP": False, "IEEE": False, "BM": how["BM"], "BN": how["BN"],
    }  # fmt: skip
    used, _ = aot.compile_for(
        segments.packed_attention_kernel, kind, constants, target, aligned=ALIGNED, num_warps=how["num_warps"], num_stages=how["num_stages"]
    )
    assert used.spills == 0 and used.registers <= 255 + 257 * target.startswith("hip")
    assert used.shared <= 164 * 1024  # of an A100's multiprocessor


def test_tiles_take_every_grouping() -> None:
    for repeat in (1, 2, 3, 7, 16, 40, 71):
        for queries, rows in ((1, 1), (900, 3)):
            how = segments_launch.tiles(queries, rows, repeat, 64)
            assert how["BM"] >= repeat and how["BM"] & (how["BM"] - 1) == 0 and how["BM"] >= 16


def test_provider_refuses_with_reasons() -> None:
    from effllm.kernels import triton as kernels

    kernels.register()
    provider = OPS["packed_attention"].providers["triton"]
    assert provider.supports(Problem("packed_attention", 0, 128, 0, 0, False, dtype=torch.bfloat16, device="cuda"))
    for bad in (
        Problem("packed_attention", 0, 512, 0, 0, False, device="cuda"),
        Problem("packed_attention", 0, 64, 0, 0, False, dtype=torch.float64, device="cuda"),
    ):
        assert not provider.supports(bad) and provider.supports(bad).reason
