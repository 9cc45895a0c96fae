"""Numbers of the Triton interpreter: a worker process, because the interpreter is chosen once for a process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """What the program `WORKER` of the test's module prints, one JSON object a line, by name."""
    worker = Path(request.module.__file__).with_name(request.module.WORKER)
    done = subprocess.run([sys.executable, str(worker)], capture_output=True, text=True, timeout=560, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}
