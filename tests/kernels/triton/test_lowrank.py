"""The low-rank Triton kernels: numerics in the interpreter, and ahead-of-time compilation for GPUs that are not here."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from torch._subclasses.fake_tensor import FakeTensorMode

from effllm.kernels import triton as kernels
from effllm.kernels.triton import aot, lowrank_ops
from effllm.kernels.triton.lowrank import lowrank_kernel
from effllm.kernels.triton.lowrank_cost import LowrankBipolarTritonTuning, LowrankTritonTuning, siblings
from effllm.kernels.triton.lowrank_gemm import stage_kernel
from effllm.kernels.triton.lowrank_place import place_kernel
from effllm.lowering.lowrank_bipolar_linear import problem_of as bipolar_problem
from effllm.lowering.lowrank_linear import problem_of
from effllm.lowering.op import OPS
from effllm.runtime.layouts import words
from tests.kernels.triton.lowrank_cases import cases

WORKER = "lowrank_cases.py"

FLOOR = {"float32": 2e-6, "float16": 5e-5}


@pytest.mark.parametrize("case", cases(), ids=lambda c: c.name)
def test_error_is_that_of_plain_torch(results: dict[str, dict[str, Any]], case: Any) -> None:
    got = results[case.name]
    assert got["guard"] and (got["same"] or got["case"]["m"] == 0), "wrote past the output, or elsewhere"
    assert got["error"] <= 2 * got["plain"] + FLOOR[got["out"]]  # NaN fails too


def test_the_barrier_leaves_its_counter_at_zero(results: dict[str, dict[str, Any]]) -> None:
    found = [got["counters"] for got in results.values() if "case" in got and got["case"]["kind"] == "fused"]
    assert len(found) == 15 and all(counters == [0, 0] for counters in found)


def test_the_model_changes_to_the_matrix_cores_for_many_rows() -> None:
    tuning = LowrankTritonTuning()
    problem = problem_of("lowrank_linear", 4096, 4096, 1024, torch.bfloat16, m=1, device="cuda")
    kinds = [tuning.first(problem.at(m))["kind"] for m in (1, 2, 4, 64, 512)]
    assert kinds[0] == "fused" and kinds[-1] == "dot" and sorted(kinds, key=["fused", "apart", "dot"].index) == kinds
    one = tuning.predict(problem, {"kind": "fused"})
    assert one.nbytes == pytest.approx(2 * 2 * 1024 * 4096, rel=0.01) and one.bound <= one.seconds < tuning.predict(problem, {"kind": "apart"}).seconds


def test_siblings_are_counted_and_cost_their_calls() -> None:
    tuning = LowrankTritonTuning()
    for count in (1, 2, 3):
        pairs = [(1024, 256)] * count
        for pivoted in (False, True):
            second = sum((n - r if pivoted else n) * r for n, r in pairs)
            total = {"second": second, "pivoted": pivoted, "device": "cuda"}
            problem = problem_of("lowrank_linear_many", 1024 * count, 2048, 256 * count, torch.bfloat16, **total)
            assert siblings(problem) == pytest.approx(count)
            one = problem_of("lowrank_linear", 1024, 2048, 256, torch.bfloat16, pivoted=pivoted, device="cuda")
            for kind in ("fused", "apart", "dot"):
                apart, merged = tuning.predict(one, {"kind": kind}), tuning.predict(problem, {"kind": kind})
                assert merged.flops == pytest.approx(count * apart.flops)
                if kind != "dot":  # one launch or two for all of them, and x is read once
                    assert merged.seconds < count * apart.seconds or count == 1
    unequal = problem_of("lowrank_linear_many", 4096 + 512, 4096, 512 + 128, torch.bfloat16, second=4096 * 512 + 512 * 128, device="cuda")
    assert 1 < siblings(unequal) < 2


def test_bipolar_factors_cost_their_two_stages() -> None:
    tuning = LowrankBipolarTritonTuning()
    about = {"bits": 4, "group": 32, "affine": False, "b_bits": 8, "device": "cuda"}
    one = bipolar_problem("lowrank_bipolar_linear", 4096, 2048, 512, **about, m=1)
    got = tuning.predict(one, tuning.first(one))
    codes = 512 * 2048 + 4096 * 512 / 2
    scales = 2 * (512 * 2048 + 4096 * 512) / 32
    assert codes + scales <= got.nbytes <= 1.05 * (codes + scales) + 2 * 4 * (2048 + 4096)
    moved = tuning.predict(bipolar_problem("lowrank_bipolar_linear", 4096, 2048, 512, **about, m=1, pivoted=True, second=4096 * 512), {"kind": "stages"})
    assert moved.seconds > got.seconds and moved.nbytes - got.nbytes == pytest.approx(2 * 2 * 4096)
    assert tuning.legal(one, {"kind": "stages"}) and not tuning.legal(one, {"kind": "fused"}) and list(tuning.configs(one)) == [tuning.first(one)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "activations of torch.float64"),
        ({"factor": torch.float64}, "factors of float64"),
        ({"pivoted": True, "channels": 4}, "pivots beside channels"),
        ({"n": 2**20, "k": 2**12}, "2^31 values"),
    ],
)
def test_refusals_of_dense_factors_say_why(change: dict[str, Any], reason: str) -> None:
    for op in ("lowrank_linear", "lowrank_linear_many"):
        base: dict[str, Any] = {"n": 512, "k": 512, "rank": 64, "factor": torch.bfloat16, "device": "cuda"}
        for pivoted in (False, True):
            assert lowrank_ops.supports(problem_of(op, **base, pivoted=pivoted))
        verdict = lowrank_ops.supports(problem_of(op, **(base | change)))
        assert not verdict and reason in verdict.reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"b_bits": 9}, "the first stage: 9 bits"), ({"bits": 9, "b_bits": 4}, "the second stage: 9 bits"), ({"b_group": 48}, "the first stage: groups of 48"),
     ({"dtype": torch.float64}, "the first stage: activations of torch.float64")],
)  # fmt: skip
def test_refusals_of_bipolar_factors_say_why(change: dict[str, Any], reason: str) -> None:
    for op in ("lowrank_bipolar_linear", "lowrank_bipolar_linear_many"):
        base: dict[str, Any] = {"bits": 4, "group": 32, "affine": False, "device": "cuda"}
        assert lowrank_ops.supports_bipolar(bipolar_problem(op, 512, 512, 64, **base))
        verdict = lowrank_ops.supports_bipolar(bipolar_problem(op, 512, 512, 64, **(base | change)))
        assert not verdict and reason in verdict.reason


def test_providers_serve_all_four_ops_with_fakes() -> None:
    kernels.register()
    for op in ("lowrank_linear", "lowrank_linear_many", "lowrank_bipolar_linear", "lowrank_bipolar_linear_many"):
        assert OPS[op].providers["triton"].device == "cuda"
    zeros, ops = partial(torch.zeros, device="cuda"), torch.ops.effllm
    with FakeTensorMode():
        x = zeros(2, 3, 64, dtype=torch.bfloat16)
        a, b, pivots = zeros(24, 8), zeros(8, 64), zeros(32, dtype=torch.int64)
        found = [
            (ops.lowrank_linear(x, a, b, None, pivots, None, "triton"), 32),
            (ops.lowrank_linear(x, a, b, None, None, None, "triton"), 24),
            (ops.lowrank_linear_many(x, [a, a], [b, b], [pivots, pivots], "triton"), 64),
            (ops.lowrank_linear_many(x, [a, a, a], [b, b, b], [], "triton"), 72),
        ]

        def factor(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
            shapes = words.fake_shapes((n, k), 4, 32)
            return zeros(shapes["codes"][0], dtype=torch.int32), zeros(shapes["scale"][0], dtype=torch.float16)

        (ac, as_), (bc, bs), grid = factor(48, 16), factor(16, 64), (4, 32, 7.5)
        more = zeros(64, dtype=torch.int64)
        found += [
            (ops.lowrank_bipolar_linear(x, ac, as_, None, bc, bs, None, None, None, 45, 16, *grid, *grid, "triton"), 45),
            (ops.lowrank_bipolar_linear(x, ac, as_, None, bc, bs, None, more, None, 48, 16, *grid, *grid, "triton"), 64),
            (ops.lowrank_bipolar_linear_many(x, [ac, ac], [as_, as_], [], [bc, bc], [bs, bs], [], *grid, *grid, "triton"), 96),
        ]
        assert [(tuple(y.shape), y.dtype) for y, _ in found] == [((2, 3, n), torch.bfloat16) for _, n in found]


def test_the_ops_run_the_launches(results: dict[str, dict[str, Any]]) -> None:
    """The argument lists of the graph ops and the providers, which no GPU call here goes through."""
    rows = [got for name, got in results.items() if name.startswith("op ")]
    assert {got["name"] for got in rows} == {"op lowrank_linear", "op lowrank_linear_many", "op lowrank_bipolar_linear", "op lowrank_bipolar_linear_many"}
    assert all(got["error"] <= got["limit"] for got in rows)


INTEGERS = (*tuple(f"{name}{i}" for name in "NR" for i in range(4)), "M", "N", "R", "C", "K", "stride", "columns", "LDW", "LDY", "ldz", "ldx", "ldy", "ldo")
POINTERS = dict.fromkeys(("x", "z", "w", "y", "out", "rest", "bias", *(f"{name}{i}" for name in "ab" for i in range(4))), "*bf16")
POINTERS |= {"workspace": "*fp32", "counter": "*i32"} | dict.fromkeys(("channels", "pivots", *(f"p{i}" for i in range(4))), "*i64")


def compiled(kernel: Any, target: str, *, absent: tuple[str, ...] = (), **constants: Any) -> tuple[aot.Resources, Any]:
    """All aligned, as columns are in whole tiles, but the numbers of rows and of channels; `absent` arguments are None."""
    names = [n for n in kernel.arg_names if n not in absent]
    signature = {name: POINTERS.get(name, "i32") for name in names if name in POINTERS or name in INTEGERS}
    aligned = tuple(n for n in signature if n not in (("M", "C") if "channels" in signature else ("M",)))
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
    # eight bf16 a load for every sibling: alignment survives the way through the arguments
    assert len(re.findall(r"ld\.global[^\n]*v4\.b32|global_load_dwordx4", text)) >= 2 * siblings
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
        assert used.spills == 0 and used.shared <= 256 * 8  # the places change from eight bytes a value to two once
