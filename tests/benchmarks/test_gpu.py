"""The GPU benchmark runs to its end without a GPU and sizes its rotating buffers right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_caches, gpu_tuning
from effllm.autotune.store import Store
from effllm.lowering import providers
from effllm.lowering.op import Problem
from tests.autotune import simulated
from tests.autotune.made import HERE, key

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
    rows, caches = rows[:3], rows[3:]
    assert head.startswith("predicted, not measured: H200") and [row.split()[0] for row in rows] == ["w4", "w2", "w1"]
    for row, line in zip(gpu_tuning.predict("cuda:90"), rows, strict=True):
        nbytes = 8192 * 8192 * (row["bits"] / 8 + 2 / 128)
        assert f"{nbytes / (row['us'] * 1e-6) / 4.8e12:.0%} of bandwidth" in line
        assert 0.1 < row["of_bandwidth"] <= row["of_bound"] * (1 + 1e-9) + 1e-3 < 1
        assert row["crossovers"][0] == (1, "gemv") and "gemv from 1" in line


    assert caches[0].startswith("caches") and len(caches) == 1 + 2 * len(gpu_caches.SPECS)
    for row, line in zip(gpu_caches.predict("cuda:90"), caches[1:], strict=True):
        assert line.startswith(f"{row['spec']} {row['tokens']} tokens: {row['us']:.1f} us") and 0 < row["of_bound"] < 1
        assert row["times"] == pytest.approx(row["dense_us"] / row["us"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in full where there is a GPU")
def test_caches_are_verified_and_a_wrong_result_ends_it() -> None:
    pytest.importorskip("triton")
    program = (
        "import torch; from benchmarks import gpu_caches as g\n"
        "rows = g.verify('cpu', 90, (torch.float32,), ('kivi(bits=4,page=32,group=32,window=8)',), ('kivi(bits=4,page=32,group=32,window=8)',))\n"
        "print(sorted({r['op'] for r in rows}), len(rows))\n"
        "g.exact = lambda layer, q, mask: torch.ones(q.shape, dtype=torch.float64)\n"
        "g.verify('cpu', 90, (torch.float32,), ('kivi(bits=4,page=32,group=32,window=8)',), ())\n"
    )
    env = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False, cwd=ROOT, env=env)
    assert done.stdout.strip() == "['kv_append', 'kv_attend', 'rotated_attention'] 9", done.stderr[-2000:]
    assert done.returncode == 1 and "wrong result" in done.stderr


def problem(m: int = 1) -> Problem:
    return Problem("bipolar_linear_a8", 96, 256, 4, 32, True, "a8", m, torch.bfloat16)


def test_it_tunes_with_a_worker_and_times_in_turns_on_whatever_device(tmp_path: Path) -> None:
    """The path of a GPU session from the search to the row, on this processor."""
    ours, why = providers.select(problem())
    if ours.tuning is None:
        pytest.skip(why)
    called: list[int] = []
    row = gpu_tuning.tune_and_compare(problem(), ours, Store(tmp_path), 1.0, None, {"dense_bf16": called.append}, seconds=0.005, slack=None)
    assert row["trials"] == row["new"] > 0 and row["bytes"] > 96 * 256 // 2 and len(called) > 10
    assert {"n": 96}.items() <= next(iter(Store(tmp_path).load())).key.problem.items()
    if row["refused"] is None:  # a busy machine may refuse the last session: then there are no times to print
        assert row["tuned_us"] > 0 and row["tuned_spread_us"] >= 0 and "dense_bf16_us" in row and row["of_bound"] > 0
        assert "quartiles" in gpu.line(row | {"m": 1, "n": 96, "k": 256, "bits": 4, "act": "a8", "of_copy": 0.1})
    again = gpu_tuning.tune_and_compare(problem(), ours, Store(tmp_path), 1e-3, None, {}, seconds=0.005, slack=None)
    assert again["trials"] >= 1, "what the store has needs no budget"


def test_nothing_right_ends_the_run_and_a_refusal_is_a_line(tmp_path: Path) -> None:
    ours = simulated.provider(simulated.BowlTuning())
    more = {"key": key(), "environment": HERE}
    with pytest.raises(SystemExit, match="no configuration"):
        gpu_tuning.tune_and_compare(problem(), ours, Store(tmp_path), 1e3, simulated.Simulated(status=lambda c: "wrong"), {}, **more)
    row = {"m": 1, "n": 96, "k": 256, "bits": 4, "act": "a8", "refused": "memory reads drift"}
    assert gpu.line(row) == "m=1 96x256 w4a8: not timed, memory reads drift"
