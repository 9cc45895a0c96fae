"""The GPU benchmark runs to its end without a GPU and sizes its rotating buffers right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures for minutes where there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    target = tmp_path / "gpu.json"
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--json", str(target)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "no GPU: nothing measured"
    assert not target.exists()


def test_copies_exceed_the_cache() -> None:
    l2 = 50 << 20
    for nbytes in (8 << 20, 64 << 20, 1 << 30):
        count = gpu.copies(nbytes, l2)
        assert count >= 2 and count * nbytes > 4 * l2
    assert gpu.copies(1, l2) == 64
