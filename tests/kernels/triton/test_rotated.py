"""Attention over turned keys in Triton: numbers in the interpreter, compilation for GPUs that are not here, and the provider's verdicts."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from effllm.kernels import triton as kernels
from effllm.kernels.triton import aot, rotated_cost, rotated_launch
from effllm.kernels.triton.rotated import rotated_attention_kernel
from effllm.lowering import providers
from effllm.lowering.pie import attention_problem
from tests.kernels.triton.rotated_cases import CASES
from tests.kernels.triton.test_aot import loop_instructions

WORKER = "rotated_cases.py"


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_error_is_at_most_that_of_keys_turned_and_rounded(results: dict[str, dict[str, Any]], case: tuple[Any, ...]) -> None:
    got = results[str(case)]
    groups, repeat, d, pairs, count, _, dtype, _, _, lie, _ = case
    assert got["shape"] == [2, groups * repeat, count, d] and got["dtype"] == f"torch.{dtype}"
    # keys are not rounded at all; fp32: sums in another order
    assert got["error"] <= (got["plain"] if dtype != "float32" else 2 * got["plain"] + 2e-7)
    assert got["wrong"] > 0.1 or lie == "one" or pairs == 0


def compiled(dim: int, repeat: int, mask: int, target: str, ones: tuple[str, ...] = ()) -> tuple[aot.Resources, Any]:
    kinds = dict.fromkeys(("S", "G", "P", "qb", "qh", "qq", "kb", "kg", "ks", "vb", "vg", "vs", "mb", "mh", "mq"), "i32")
    kinds |= dict.fromkeys(("q", "k", "v"), "*bf16") | dict.fromkeys(("cos", "sin", "part", "stats"), "*fp32") | {"row": "*i32", "scale": "fp32"}
    rows = max(16 if target.startswith("hip") else 8, rotated_launch.rows_of(repeat))
    constants: dict[str, Any] = {"R": repeat, "Q": 1, "D": dim, "DP": rotated_launch.padded(dim), "BM": rows, "BT": rotated_launch.tile_of(64, dim)}
    constants |= {"MASK": mask, "HALF": True, "SPLITS": 7}
    constants |= {"mk": 1} if mask else {"mask": None}
    kinds |= {"mask": "*u8"} if mask else {"mk": "i32"}
    aligned = ("q", "k", "v", "cos", "sin", "row", "part", "stats", "qh", "kg", "ks", "vg", "vs", "kb", "vb")
    kinds = {name: kind for name, kind in kinds.items() if name not in ones}
    how = rotated_launch.how(dim, target.startswith("hip"))
    return aot.compile_for(rotated_attention_kernel, kinds, constants | dict.fromkeys(ones, 1), target, aligned=aligned, **how)


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize(("dim", "repeat", "mask", "ones"), [(64, 3, 3, ()), (128, 4, 0, ()), (40, 8, 3, ("S", "G", "P"))])
def test_compiles_without_spills(target: str, dim: int, repeat: int, mask: int, ones: tuple[str, ...]) -> None:
    used, _ = compiled(dim, repeat, mask, target, ones)
    assert used.spills == 0 and used.registers <= 255 + 257 * target.startswith("hip")
    assert used.shared <= (64 if target.startswith("hip") else 164) * 1024


@pytest.mark.slow
def test_instructions_an_element_are_those_of_the_cost_model() -> None:
    _, code = compiled(128, 4, 3, "cuda:90")
    measured = sum(loop_instructions(aot.sass(code)).values()) * rotated_launch.how(128)["num_warps"] * 32 / (64 * 128 * 2)
    assert rotated_cost.predict(1 << 20, 1, 8, 128, 8, torch.bfloat16, 8, "cpu").instructions / (1 << 20) / (2 * 8 * 128) == pytest.approx(measured, rel=0.15)


def test_refusals_say_why_and_a_gpu_gets_the_kernel() -> None:
    kernels.register()

    def problem(q: torch.Tensor) -> Any:
        found = attention_problem(q, 8)
        return type(found)(**(vars(found) | {"device": "cuda"}))

    assert providers.select(problem(torch.zeros(1, 8, 1, 64)))[0].name == "triton"
    for q, why in ((torch.zeros(1, 8, 5, 64), "5 queries"), (torch.zeros(1, 8, 1, 512), "512 channels"), (torch.zeros(1, 8, 1, 64).double(), "float64")):
        verdict = rotated_launch.supports(problem(q))
        assert not verdict and why in verdict.reason
        assert why in providers.select(problem(q))[1]


def test_fake_gives_shape_and_dtype() -> None:
    kernels.register()
    with FakeTensorMode():
        q, k = (torch.empty(1, h, 1, 64, dtype=torch.bfloat16, device="cuda") for h in (8, 2))
        row, table = torch.empty(1, dtype=torch.int32, device="cuda"), torch.empty(4, 32, device="cuda")
        y = torch.ops.effllm.rotated_attention(q, k, k, None, row, table, table, "half", 0.125, "triton")
        assert (y.shape, y.dtype, y.device.type) == (q.shape, q.dtype, "cuda")


def test_splits_grow_with_keys() -> None:
    counts = [rotated_cost.splits(keys, 1, 8, 128, 8, torch.bfloat16, "cpu") for keys in (1, 64, 4096, 65536)]
    assert counts[:2] == [1, 1] and 1 < counts[2] <= counts[3]
