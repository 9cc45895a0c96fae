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
from effllm.kernels.triton.lowrank import lowrank_kernel
from effllm.kernels.triton.lowrank_cost import LowrankTritonTuning
from effllm.kernels.triton.lowrank_gemm import stage_kernel
from effllm.kernels.triton.lowrank_place import place_kernel
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
    assert got["guard"] and (got["same"] or got["case"]["m"] == 0), "wrote past the output, or elsewhere"
    assert got["error"] <= 2 * got["plain"] + FLOOR[got["out"]]  # NaN fails too


def test_the_barrier_leaves_its_counter_at_zero(results: dict[str, dict[str, Any]]) -> None:
    found = [got["counters"] for got in results.values() if got["case"]["kind"] == "fused"]
    assert len(found) == 15 and all(counters == [0, 0] for counters in found)


def test_the_model_changes_to_the_matrix_cores_for_many_rows() -> None:
    tuning = LowrankTritonTuning()
    problem = problem_of("lowrank_linear", 4096, 4096, 1024, torch.bfloat16, m=1, device="cuda")
    kinds = [tuning.first(problem.at(m))["kind"] for m in (1, 2, 4, 64, 512)]
    assert kinds[0] == "fused" and kinds[-1] == "dot" and sorted(kinds, key=["fused", "apart", "dot"].index) == kinds
    one = tuning.predict(problem, {"kind": "fused"})
    assert one.nbytes == pytest.approx(2 * 2 * 1024 * 4096, rel=0.01) and one.bound <= one.seconds < tuning.predict(problem, {"kind": "apart"}).seconds


INTEGERS = (*tuple(f"{name}{i}" for name in "NR" for i in range(4)), "M", "N", "R", "C", "K", "stride", "columns", "LDW", "LDY", "ldz", "ldx", "ldy", "ldo")
POINTERS = dict.fromkeys(("x", "z", "w", "y", "out", "rest", "bias", *(f"{name}{i}" for name in "ab" for i in range(4))), "*bf16")
POINTERS |= {"workspace": "*fp32", "counter": "*i32"} | dict.fromkeys(("channels", "pivots", *(f"p{i}" for i in range(4))), "*i64")


def compiled(kernel: Any, target: str, *, absent: tuple[str, ...] = (), **constants: Any) -> tuple[aot.Resources, Any]:
    """Everything aligned but what need not be; `absent` arguments are None."""
    names = [n for n in kernel.arg_names if n not in absent]
    signature = {name: POINTERS.get(name, "i32") for name in names if name in POINTERS or name in INTEGERS}
    aligned = tuple(n for n in signature if n not in ("M", "C", "columns"))
    return aot.compile_for(kernel, signature, constants | dict.fromkeys(absent), target, aligned=aligned)


def without(siblings: int, pivots: bool, alone: bool) -> tuple[str, ...]:
    gone = [f"{name}{i}" for name in "abp" for i in range(siblings, 4)]
    return (*gone, *(() if pivots else (f"p{i}" for i in range(siblings))), *(() if alone else ("channels", "bias")))


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize(("rows", "siblings", "pivots", "alone"), [(1, 1, False, False), (4, 1, False, True), (1, 3, True, False), (4, 2, True, False)])
def test_few_rows_spill_nothing(target: str, rows: int, siblings: int, pivots: bool, alone: bool) -> None:
    tiles = {"BR": 16, "BK": 256 if rows == 1 else 128, "MB": rows, "SPLIT": 4}  # those of lowrank_launch.plan
    used, found = compiled(lowrank_kernel, target, absent=without(siblings, pivots, alone), PART=0, **tiles)
    # the barrier needs two programs of 128 threads resident on every multiprocessor: 65536 registers, on AMD 512 a lane of each unit
    assert used.spills == 0 and used.registers <= (256 if target.startswith("hip") else 255)
    text = found.asm["amdgcn"] if target.startswith("hip") else found.asm["ptx"]
    assert len(re.findall(r"atom|atomic_", text)) >= 3, "the barrier is gone"
    if not target.startswith("hip"):
        # eight bf16 a load for every sibling: alignment survives the way through the arguments
        assert len(re.findall(r"ld\.global[^\n]*v4\.b32", text)) >= 2 * siblings
    if siblings == 1:
        for part in (1, 2):
            assert compiled(lowrank_kernel, target, absent=(*without(1, pivots, alone), "counter"), PART=part, **tiles)[0].spills == 0


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.TARGETS)
def test_many_rows_run_on_the_matrix_cores(target: str) -> None:
    kinds = (("channels", "pivots", "bias", "out"), ("pivots", "out"), ("channels", "out"), ("channels",))
    for absent in kinds:  # plain, with channels, second and first stage of pivoted rows
        used, found = compiled(stage_kernel, target, absent=absent, BM=64, BN=64, BK=64, STAGES=2)
        assert used.spills <= 16 and used.registers <= 255
        text = found.asm["amdgcn"] if target.startswith("hip") else found.asm["ptx"]
        assert re.search(r"v_mfma|mma\.sync|wgmma|tcgen05\.mma", text)


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.TARGETS)
def test_places_compile(target: str) -> None:
    for absent in ((), ("bias",)):
        used, _ = compiled(place_kernel, target, absent=absent, BN=256)
        assert used.spills == 0 and used.shared == 0
