"""Every Triton kernel in the interpreter against fp64, one process for all cases."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")
from tests.kernels.triton.triton_cases import cases

WORKER = "triton_cases.py"

# The kernel may err twice as much as plain torch in the output's dtype, plus: fp32 sums of at most 256 terms; and for 16-bit
# activations through the GEMV, whose chains give 8 of 24 bits to the lifted sums (kernels/triton/gemv.py), 2^-24 * 2^8.
FLOOR = {"float32": 2e-6, "float16": 5e-5}
LIFTED = 2.0**-16


@pytest.mark.parametrize("case", cases(), ids=lambda c: c.name)
def test_error_is_that_of_plain_torch(results: dict[str, dict[str, Any]], case: Any) -> None:
    got = results[case.name]
    assert got["shape"] == [case.m, case.n]
    assert got["guard"], "wrote past the output"
    lifted = LIFTED if not case.a8 and case.dtype != "float32" else 0.0
    assert got["error"] <= 2 * got["plain"] + FLOOR[got["out"]] + lifted  # NaN fails too


@pytest.mark.parametrize("kind", ["gemv", "gemm", "dense"])
def test_swapped_scales_are_noticed(results: dict[str, dict[str, Any]], kind: str) -> None:
    got = results[f"swapped-{kind}"]
    assert got["error"] > 100 * (got["plain"] + FLOOR["float16"])


def test_split_sums_repeat_bit_for_bit(results: dict[str, dict[str, Any]]) -> None:
    assert results["twice"]["equal"]


def test_opcheck_passes(results: dict[str, dict[str, Any]]) -> None:
    found = {key: value for key, value in results["opcheck"].items() if key != "name"}
    assert len(found) == 6
    for checks in found.values():
        assert checks and set(checks.values()) == {"SUCCESS"}
