"""The Triton Monarch kernels: numbers in the interpreter, compilation for GPUs that are not here, and the choice between them."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from effllm.autotune.gpus import CLASSES
from effllm.kernels import triton as kernels
from effllm.kernels.triton import aot, monarch_gemm, monarch_gemv, monarch_launch
from effllm.kernels.triton.monarch_choose import MonarchTiles, MonarchTritonTuning, held
from effllm.lowering.monarch_linear import LINEAR, detail
from effllm.lowering.op import Problem
from tests.kernels.triton.monarch_cases import cases

WORKER = "monarch_cases.py"

FLOOR = {"float32": 2e-6, "float16": 5e-5, "bfloat16": 4e-4}


@pytest.mark.parametrize("case", cases(), ids=lambda c: c.name)
def test_error_is_that_of_plain_torch(results: dict[str, dict[str, Any]], case: Any) -> None:
    got = results[case.name]
    assert got["shape"] == [case.m, case.n]
    assert got["guard"], "wrote past the output"
    assert got["error"] <= 2 * got["plain"] + FLOOR[got["out"]]  # NaN fails too


@pytest.mark.parametrize("kind", ["fused", "pair", "gemm"])
def test_swapped_blocks_are_noticed(results: dict[str, dict[str, Any]], kind: str) -> None:
    assert results[f"swapped-{kind}"]["error"] > 0.05


def test_a_replay_finds_its_counters_zero(results: dict[str, dict[str, Any]]) -> None:
    got = results["replayed"]
    assert got["equal"] and got["differs"] and got["zero"]


def problem(m: int, dtype: torch.dtype = torch.bfloat16, n: int = 4096, k: int = 4096, rank: int = 256, values: str = "") -> Problem:
    sizes = detail(4, 4, rank, False, values or str(dtype).removeprefix("torch."))
    return Problem("monarch_linear", n, k, 0, 0, False, m=m, dtype=dtype, device="cuda", detail=sizes)


SIZES = ("M", "N", "K", "P", "S", "T", "I", "O", "stride", "programs")
ALIGNED = ("x", "w1", "w2", "z", "y", "N", "K", "P", "S", "T", "stride")
NAME = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def compiled(kernel: Any, tiles: MonarchTiles, dtype: torch.dtype, target: str, *, bias: bool, aligned: bool = True) -> tuple[aot.Resources, Any]:
    """Compile a kernel as monarch_launch.py would call it."""
    act = NAME[dtype]
    z = act if tiles.kind == "gemm" else "*fp32"
    types = {"x": act, "w1": act, "w2": act, "y": act, "z": z, "counter": "*i32", "bias": act, **dict.fromkeys(SIZES, "i32")}
    signature = {name: types[name] for name in kernel.arg_names if name in types}
    constants: dict[str, Any] = {"BN": tiles.bn, "BK": tiles.bk, "STAGES": tiles.stages, "STRIDED": False}
    constants |= {"BM": tiles.bm} if tiles.kind == "gemm" else {"MB": tiles.bm}
    if not bias:
        constants["bias"] = None
        signature.pop("bias", None)
    constants = {name: v for name, v in constants.items() if name in kernel.arg_names}
    names = tuple(a for a in ALIGNED if a in signature) if aligned else ()
    return aot.compile_for(kernel, signature, constants, target, num_warps=tiles.warps, num_stages=tiles.stages, aligned=names)


def cheapest(p: Problem, kind: str, target: str) -> MonarchTiles:
    tuning = MonarchTritonTuning(target)
    best = min((c for c in tuning.configs(p) if c["kind"] == kind), key=lambda c: tuning.predict(p, c).seconds)
    return MonarchTiles(**best)


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("m", [1, 4])
def test_the_single_launch_spills_nothing_and_is_resident(m: int, target: str) -> None:
    tiles = cheapest(problem(m), "fused", target)
    used, code = compiled(monarch_gemv.fused_kernel, tiles, torch.bfloat16, target, bias=True)
    assert used.spills == 0
    threads = tiles.warps * (64 if target.startswith("hip") else 32)
    # all programs of a multiprocessor at once: AMD has 512 registers for a lane of each of four vector units
    assert used.registers <= held(tiles), "the estimate that keeps configurations resident is too low"
    assert used.registers * threads * tiles.each <= (4 * 512 * 64 if target.startswith("hip") else 65536) and used.shared * tiles.each <= CLASSES[target].smem
    text = code.asm["amdgcn" if target.startswith("hip") else "ptx"]
    assert re.search(r"global_atomic_add|atom\S*\.add", text), "no barrier"


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_pair_spills_nothing(dtype: torch.dtype, target: str) -> None:
    tiles = cheapest(problem(2, dtype), "pair", target)
    for kernel in (monarch_gemv.first_kernel, monarch_gemv.second_kernel):
        used, _ = compiled(kernel, tiles, dtype, target, bias=False, aligned=dtype == torch.bfloat16)
        assert used.spills == 0 and used.registers <= 255


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_products_fit(dtype: torch.dtype, target: str) -> None:
    tiles = cheapest(problem(512, dtype), "gemm", target)
    for kernel in (monarch_gemm.first_gemm, monarch_gemm.second_gemm):
        used, code = compiled(kernel, tiles, dtype, target, bias=True)
        assert used.spills <= 16 and used.registers <= 255 and used.shared <= CLASSES[target].smem
        if dtype == torch.bfloat16:
            text = code.asm["amdgcn" if target.startswith("hip") else "ptx"]
            assert re.search(r"v_mfma|mma\.sync|wgmma|tcgen05\.mma", text), "the product is not on the matrix cores"


def test_one_launch_for_decoding_and_two_products_for_prefill() -> None:
    tuning = MonarchTritonTuning("cuda:90")
    assert [tuning.first(problem(m))["kind"] for m in (1, 4, 16, 512)] == ["fused", "fused", "gemm", "gemm"]
    times = [tuning.predict(problem(m), tuning.first(problem(m))).seconds for m in (1, 16, 512, 8192)]
    assert times == sorted(times)


def test_configurations_are_legal_and_others_are_not() -> None:
    tuning = MonarchTritonTuning("cuda:90")
    for p in (problem(1), problem(3), problem(100), problem(2, torch.float32)):
        assert all(tuning.legal(p, c) for c in tuning.configs(p))
    good = dict(tuning.first(problem(1)))
    for change in ({"kind": "dense"}, {"bn": 7}, {"bm": 4}, {"warps": 3}):
        assert not tuning.legal(problem(1), good | change)
    assert not tuning.legal(problem(64), good) and not tuning.legal(problem(1), {"kind": "fused"})


def test_the_provider_says_what_it_takes() -> None:
    kernels.register()
    provider = LINEAR.providers["triton"]
    assert provider.supports(problem(1))
    for odd in (problem(1, torch.float64), problem(1, values="int8"), dataclasses.replace(problem(1), n=2**27)):
        verdict = provider.supports(odd)
        assert not verdict and verdict.reason


def test_counters_without_a_gpu_are_new_and_zero() -> None:
    a, b = (monarch_launch.counter(torch.device("cpu")) for _ in range(2))
    assert a.tolist() == [0, 0] and a.data_ptr() != b.data_ptr()
