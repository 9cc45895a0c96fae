"""The Triton kernels that skip channels: numbers in the interpreter, and compilation for GPUs that are not here without a spill."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")
import torch

from effllm.kernels.triton import aot, skip, skip_launch, skip_ops
from effllm.lowering.sparse_linear import problem
from tests.kernels.triton.skip_cases import KINDS, names

WORKER = "skip_cases.py"


@pytest.mark.parametrize("name", names())
def test_error_is_that_of_plain_torch_and_nan_is_not_skipped(results: dict[str, dict[str, Any]], name: str) -> None:
    got = results[name]
    assert got["error"] <= 2 * got["plain"] + 2e-6
    assert got["nan"] is not False


@pytest.mark.parametrize("kind", ["input", "rest", "output"])
@pytest.mark.parametrize("target", sorted(aot.TARGETS))
def test_compiles_without_a_spill(target: str, kind: str) -> None:
    plain = {"x": "*bf16", "threshold": "*fp32", "M": "i32", "N": "i32", "K": "i32", "stride": "i32", "rank": "i32", "units": "i32", "tiles": "i32"}
    plain |= {"width": "i32", "groups": "i32", "zero": "fp32", "y": "*bf16"}
    runs: list[tuple[Any, dict[str, str], dict[str, Any]]] = []
    if kind == "rest":
        runs.append((skip.skip_rest_kernel, plain | {"norm": "*fp32", "v": "*bf16", "z": "*fp32"}, {"EACH": False, "BK": 128, "BR": 16}))
    for bits, group in ((0, 0), (4, 32), (8, 128)):
        coded = {"weight": "*u8", "scale": "*fp16"} if bits else {"weight": "*bf16"}
        missing = {"norm": None, "minimum": None, "u": None, "z": None, "bias": None} | ({} if bits else {"scale": None})
        sizes = {"EACH": True, "BITS": bits, "GROUP": group}
        if kind == "input":
            bs = skip_launch.listed(bits, group)
            runs.append((skip.skip_input_kernel, plain | coded, missing | sizes | {"BS": bs, "BK": bs // 4, "BN": 128, "BR": 16, "SPLIT": 1}))
        elif kind == "output":
            runs.append((skip.skip_output_kernel, plain | coded | {"gate": "*bf16"}, missing | sizes | {"BK": 32 if bits else 128, "BS": 32, "BN": 16}))
    for kernel, types, constants in runs:
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        signature = {name: kind for name, kind in types.items() if name in kernel.arg_names and name not in constants}
        resources, _ = aot.compile_for(kernel, signature, constants, target)
        assert resources.spills == 0 and resources.registers <= 255


def test_what_is_refused_and_what_is_taken() -> None:
    for op, bits, group, _ in KINDS:
        assert skip_ops.supports(problem(op, 64, 64, bits=bits, group=group, device="cuda"))
    assert "fp16, bf16" in skip_ops.supports(problem("sparse_linear", 64, 64, dtype=torch.float64)).reason
    assert "groups of 48" in skip_ops.supports(problem("sparse_bipolar_linear", 64, 64, bits=4, group=48)).reason
    assert "2^24" in skip_ops.supports(problem("sparse_linear", 1 << 24, 64)).reason
