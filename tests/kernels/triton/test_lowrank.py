"""The low-rank Triton kernels: numerics in the interpreter, and ahead-of-time compilation for GPUs that are not here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from effllm.kernels.triton import aot
from effllm.kernels.triton.lowrank import first_kernel, fused_kernel, second_kernel
from effllm.kernels.triton.lowrank_cost import LowrankTritonTuning
from effllm.kernels.triton.lowrank_gemm import stage_kernel
from effllm.lowering.lowrank_linear import problem_of
from tests.kernels.triton.lowrank_cases import cases

FLOOR = {"float32": 2e-6, "float16": 5e-5}


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    worker = Path(__file__).with_name("lowrank_cases.py")
    done = subprocess.run([sys.executable, str(worker)], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("case", cases(), ids=lambda c: c.name)
def test_error_is_that_of_plain_torch(results: dict[str, dict[str, Any]], case: Any) -> None:
    got = results[case.name]
    assert got["guard"], "wrote past the output"
    assert got["error"] <= 2 * got["plain"] + FLOOR[got["out"]]  # NaN fails too


def test_the_barrier_leaves_its_counter_at_zero(results: dict[str, dict[str, Any]]) -> None:
    found = [got["counters"] for got in results.values() if got["case"]["kind"] == "fused"]
    assert len(found) == 5 and all(counters == [0, 0] for counters in found)


def test_the_model_changes_to_the_matrix_cores_for_many_rows() -> None:
    tuning = LowrankTritonTuning()
    problem = problem_of("lowrank_linear", 4096, 4096, 1024, torch.bfloat16, m=1, device="cuda")
    kinds = [tuning.first(problem.at(m))["kind"] for m in (1, 2, 4, 64, 512)]
    assert kinds[0] == "fused" and kinds[-1] == "dot" and sorted(kinds, key=["fused", "apart", "dot"].index) == kinds
    one = tuning.predict(problem, {"kind": "fused"})
    assert one.nbytes == pytest.approx(2 * 2 * 1024 * 4096, rel=0.01) and one.bound <= one.seconds < tuning.predict(problem, {"kind": "apart"}).seconds


INTEGERS = ("M", "N", "R", "C", "K", "stride", "columns", "ldz", "ldx")
POINTERS = {"x": "*bf16", "z": "*bf16", "a": "*bf16", "b": "*bf16", "w": "*bf16", "y": "*bf16", "workspace": "*fp32", "counter": "*i32"}


def compiled(kernel: Any, target: str, *, channels: bool, **constants: Any) -> tuple[aot.Resources, Any]:
    present = {"channels": "*i64", "bias": "*bf16"} if channels else {}
    signature = {name: kind for name, kind in ({**POINTERS, **present} | dict.fromkeys(INTEGERS, "i32")).items() if name in kernel.arg_names}
    absent = {} if channels else {name: None for name in ("channels", "bias") if name in kernel.arg_names}
    aligned = tuple(n for n in ("x", "z", "a", "b", "w", "y", "workspace", "K", "R", "N", "stride", "ldz", "ldx") if n in kernel.arg_names)
    return aot.compile_for(kernel, signature, constants | absent, target, aligned=aligned)


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("rows", [1, 4])
def test_few_rows_spill_nothing(target: str, rows: int) -> None:
    tiles = {"BR": 16, "BK": 256 if rows == 1 else 128, "MB": rows}  # those of lowrank_launch.plan
    used, found = compiled(fused_kernel, target, channels=rows == 4, SPLIT=4, **tiles)
    # the barrier needs two programs of 128 threads resident on every multiprocessor: 65536 registers, on AMD 512 a lane of each unit
    assert used.spills == 0 and used.registers <= (256 if target.startswith("hip") else 255)
    text = found.asm["amdgcn"] if target.startswith("hip") else found.asm["ptx"]
    assert len(re.findall(r"atom|atomic_", text)) >= 3, "the barrier is gone"
    for kernel, more in ((first_kernel, {}), (second_kernel, {"SPLIT": 4})):
        assert compiled(kernel, target, channels=False, **tiles, **more)[0].spills == 0


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.TARGETS)
def test_many_rows_run_on_the_matrix_cores(target: str) -> None:
    for channels in (False, True):
        used, found = compiled(stage_kernel, target, channels=channels, BM=64, BN=64, BK=64, STAGES=2)
        assert used.spills <= 16 and used.registers <= 255
        text = found.asm["amdgcn"] if target.startswith("hip") else found.asm["ptx"]
        assert re.search(r"v_mfma|mma\.sync|wgmma|tcgen05\.mma", text)
