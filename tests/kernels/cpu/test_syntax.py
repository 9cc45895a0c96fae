"""The AVX-512 build compiles where it cannot run: what only instantiates there (names, intrinsics) would break unseen on such a machine."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import pytest

from effllm.kernels.cpu import build

AVX512 = build.ISAS[0]
FLAGS = ("-march=icelake-server", "-mavx512bf16")  # all that the sources ask for by macros


@pytest.mark.slow
@pytest.mark.skipif(not build.missing(AVX512), reason="this machine builds and runs it")
@pytest.mark.parametrize("unit", build.UNITS)
def test_units_compile_for_avx512(unit):
    isa = replace(AVX512, flags=FLAGS)
    done = subprocess.run([*build._command(build.compiler(), isa), "-fsyntax-only", str(build.HERE / unit)], capture_output=True, text=True)
    if "bad value" in done.stderr or "unrecognized" in done.stderr:
        pytest.skip("the compiler does not know this processor")
    assert done.returncode == 0, done.stderr[-2000:]
