"""The Triton kernel for edited caches: numerics in the interpreter, and ahead-of-time compilation for GPUs that are not here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from effllm.kernels.triton import aot
from effllm.kernels.triton.pie import pie_kernel
from tests.kernels.triton.pie_cases import CASES


def test_error_is_that_of_plain_torch() -> None:
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("pie_cases.py"))], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(CASES)
    for case, row in zip(CASES, rows, strict=True):
        assert row["error"] <= 2 * row["plain"] + 1e-7, case  # NaN fails too


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.TARGETS)
def test_compiles_without_spills(target: str) -> None:
    signature = {"k": "*bf16", "source": "*i64", "row": "*i32", "cos": "*fp32", "sin": "*fp32", "out": "*bf16"}
    integers = dict.fromkeys(("T", "G", "kb", "kg", "ks", "D", "P"), "i32")
    used, _ = aot.compile_for(pie_kernel, signature | integers, {"BT": 16, "BD": 128, "HALF": True}, target, aligned=("k", "out", "D", "ks"))
    assert used.spills == 0 and used.registers <= 128
