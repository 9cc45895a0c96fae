"""The native kernels are built before the first test, so that no test's time limit counts the compiler, and no two workers wait for it."""

from __future__ import annotations

import contextlib

import pytest

from effllm.errors import KernelError
from effllm.kernels.cpu import build


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or config.option.collectonly:
        return
    for isa in build.ISAS:
        if not build.missing(isa):
            with contextlib.suppress(KernelError):  # the tests that need it say why it is not there
                build.build(isa)
