"""The GPU benchmark runs to its end without a GPU and sizes its rotating buffers right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_tuning
from effllm.autotune.fingerprint import Environment
from effllm.autotune.key import Key
from effllm.autotune.store import Store

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


def test_predictions_need_no_gpu_and_call_themselves_so() -> None:
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu", "--predict"], capture_output=True, text=True, check=True, cwd=ROOT)
    head, *rows = done.stdout.splitlines()
    assert head.startswith("predicted, not measured: H200") and [row.split()[0] for row in rows] == ["w4", "w2", "w1"]
    for row, line in zip(gpu_tuning.predict("cuda:90"), rows, strict=True):
        nbytes = 8192 * 8192 * (row["bits"] / 8 + 2 / 128)
        assert f"{nbytes / (row['us'] * 1e-6) / 4.8e12:.0%} of bandwidth" in line
        assert 0.1 < row["of_bandwidth"] <= row["of_bound"] * (1 + 1e-9) + 1e-3 < 1
        assert row["crossovers"][0] == (1, "gemv") and "gemv from 1" in line


def test_timings_wrong_results_and_failures_are_kept_and_the_bad_not_tried_again(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from effllm.kernels.triton.config import Tiles

    tiles = [Tiles("gemv", 1, 64, 256, split) for split in (1, 2, 4, 8, 16)]
    verdicts = dict(zip(tiles, ((1e-3, 1e-3), (float("nan"), 1e-3), RuntimeError("CUDA out of memory"), RuntimeError("illegal"), (9e-3, 1e-3)), strict=True))
    tried: list[Tiles] = []

    def check(config: Tiles) -> tuple[float, float]:
        tried.append(config)
        found = verdicts[config]
        if isinstance(found, RuntimeError):
            raise found
        return found

    problem, store = gpu_tuning.problem_of(4096, 4096, 4, 1), Store(tmp_path)
    where = Environment({"kind": "cuda", "name": "Made Up 9000"}, {"triton": "3.6"})
    ranked = [(1e-5, config) for config in tiles]
    timed = gpu_tuning.measure(problem, ranked, check, lambda config: (2e-5, 0.05), store, where)
    assert [row["config"] for row in timed] == [tiles[0].config()]
    found = Store(tmp_path).results(Key.of(problem, "triton"), where)
    assert sorted(m.status for m in found.values()) == ["error", "ok", "oom", "wrong", "wrong"]
    kept = next(m for m in found.values() if m.status == "ok")
    assert (kept.config, kept.seconds, kept.spread, kept.predicted) == (tiles[0].config(), 2e-5, pytest.approx(1e-6), 1e-5)
    tried.clear()
    gpu_tuning.measure(problem, ranked, check, lambda config: (3e-5, 0.05), store, where)
    assert tried == tiles[:1]
    best = store.find(Key.of(problem, "triton"), environment=where)
    assert best is not None and best.seconds == 3e-5, "the newest timing counts"
