"""The 2:4 Triton kernels: numbers in the interpreter, and compilation for GPUs that are not here without a spill."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")
import torch

from effllm.kernels.triton import aot, nm, nm_launch, nm_ops
from effllm.lowering.nm_linear import problem
from tests.kernels.triton.nm_cases import cases

WORKER = "nm_cases.py"

# at most twice plain torch's error in the same dtype, plus fp32 sums of at most 640 terms, and for fp16 the rounding of the output
FLOOR = {"float32": 2e-6, "float16": 5e-5}


@pytest.mark.parametrize("case", cases(), ids=lambda c: c.name)
def test_error_is_that_of_plain_torch(results: dict[str, dict[str, Any]], case: Any) -> None:
    got = results[case.name]
    assert got["shape"] == [case.m, case.n]
    assert got["guard"], "wrote past the output"
    assert got["error"] <= 2 * got["plain"] + FLOOR[case.dtype]  # NaN fails too


@pytest.mark.parametrize("path", ["gemv", "gemm", "dense"])
def test_a_swapped_index_is_noticed(results: dict[str, dict[str, Any]], path: str) -> None:
    assert results[f"swapped-{path}"]["error"] > 0.1


def test_split_sums_repeat_bit_for_bit(results: dict[str, dict[str, Any]]) -> None:
    assert results["twice"]["equal"]


def test_opcheck_passes(results: dict[str, dict[str, Any]]) -> None:
    found = {key: value for key, value in results["opcheck"].items() if key != "name"}
    assert len(found) == 3 and all(set(checks.values()) == {"SUCCESS"} for checks in found.values())


def test_refusals_have_reasons() -> None:
    good = problem("nm_linear", 64, 64, 2, 4, values=torch.bfloat16, device="cuda")
    assert nm_ops.supports(good)
    for bad in (
        problem("nm_linear", 64, 64, 4, 8, values=torch.bfloat16), problem("nm_bipolar_linear", 64, 64, 2, 4, bits=3, group=32),
        problem("armor_linear", 48, 48, 2, 4, values=torch.bfloat16, block=24), problem("nm_linear", 1 << 16, 1 << 16, 2, 4, values=torch.bfloat16),
    ):  # fmt: skip
        assert not nm_ops.supports(bad) and nm_ops.supports(bad).reason


SIZES = dict.fromkeys(("M", "N", "K", "NP", "H", "stride", "tiles"), "i32")
ALIGNED = ("x", "values", "index", "scale", "y", "left", "N", "K", "NP", "H", "stride")


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize(("bits", "block", "split"), [(0, 0, 1), (0, 64, 1), (0, 128, 1), (0, 0, 4), (8, 0, 1), (4, 0, 2), (4, 64, 1)])
@pytest.mark.parametrize("path", ["gemv", "gemm"])
def test_compiles_without_spills(target: str, bits: int, block: int, split: int, path: str) -> None:
    bn = nm_launch.outputs(8192, block, path)
    stored = "*u8" if bits else "*bf16"
    signature = {"x": "*bf16", "values": stored, "index": "*i32", "y": "*fp32" if split > 1 else "*bf16", "zero": "fp32", **SIZES}
    constants: dict[str, Any] = {"minimum": None, "bias": None, "BITS": bits, "GROUP": 32, "BLOCK": block, "BN": bn, "SPLIT": split}
    for key, present, kind in (("scale", bits, "*fp16"), ("left", block, "*bf16")):
        signature |= {key: kind} if present else {}
        constants |= {} if present else {key: None}
    constants |= {"R": nm_launch.WORD_ROWS} if path == "gemv" else {"BM": nm_launch.GEMM_ROWS, "BH": nm_launch.GROUPS}
    kernel = nm.nm_gemv_kernel if path == "gemv" else nm.nm_gemm_kernel
    used, _ = aot.compile_for(kernel, signature, constants, target, aligned=tuple(a for a in ALIGNED if a in signature), num_warps=nm_launch.warps(bn, path))
    assert used.spills == 0 and used.registers <= 168  # three programs of four warps on a multiprocessor


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.TARGETS)
def test_small_kernels_compile(target: str) -> None:
    signature = {"values": "*u8", "scale": "*fp16", "index": "*i32", "w": "*bf16", "N": "i32", "K": "i32", "NP": "i32", "H": "i32", "zero": "fp32"}
    used, _ = aot.compile_for(nm.nm_dense_kernel, signature, {"minimum": None, "BITS": 4, "GROUP": 32, "BH": 16, "BN": 64}, target)
    assert used.spills == 0 and used.registers <= 128
    for block in nm_ops.BLOCKS:
        used, _ = aot.compile_for(nm.block_kernel, {"x": "*bf16", "right": "*bf16", "u": "*bf16", "K": "i32", "stride": "i32"}, {"BLOCK": block}, target)
        assert used.spills == 0
        signature = {"workspace": "*fp32", "left": "*bf16", "y": "*bf16", "M": "i32", "N": "i32"}
        used, _ = aot.compile_for(nm.finish_kernel, signature, {"bias": None, "SPLIT": 4, "BLOCK": block}, target)
        assert used.spills == 0
