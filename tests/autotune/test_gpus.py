"""Constants of GPUs: data sheets by class, the present chip's own figures over them, measured ones over those."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from effllm.autotune import fingerprint, gpus, machines
from effllm.autotune.gpus import CLASSES, DEFAULT, by_class

ROOT = Path(__file__).resolve().parents[2]
HERE = fingerprint.Environment({"kind": "cuda", "name": "Made Up 9000"}, {})


def test_unknown_chips_get_the_nearest_older_class() -> None:
    assert by_class("cuda:120") is CLASSES["cuda:100"]
    assert by_class("cuda:87") is CLASSES["cuda:86"]
    assert by_class("cuda:75") is DEFAULT and by_class("hip:gfx1100") is DEFAULT


def test_a_chip_scales_its_class() -> None:
    chip = SimpleNamespace(name="Half", major=9, minor=0, multi_processor_count=66, L2_cache_size=25 << 20, memory_clock_rate=3_000_000, memory_bus_width=3072)
    found = gpus.of_properties(chip)
    assert (found.name, found.sms, found.l2, found.bandwidth) == ("Half", 66, 25 << 20, 3e9 * 2 * 3072 / 8)
    assert found.mma16 == DEFAULT.mma16 / 2 and found.mma32 == DEFAULT.mma32 / 2 and found.clock == DEFAULT.clock
    bare = gpus.of_properties(SimpleNamespace(name="Bare", major=8, minor=0, multi_processor_count=108))
    assert (bare.bandwidth, bare.l2, bare.smem) == (CLASSES["cuda:80"].bandwidth, CLASSES["cuda:80"].l2, CLASSES["cuda:80"].smem)


def test_without_a_gpu_the_default_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cpu", "cuda", "cuda:3"):
        assert machines.gpu(device) == gpus.constants(DEFAULT)
    assert not machines.is_calibrated("cuda")


def test_measured_constants_replace_the_data_sheet_one_by_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda index: torch.cuda.device_of(torch.zeros(())))
    monkeypatch.setattr(fingerprint, "environment", lambda device: HERE)
    monkeypatch.setattr(gpus, "of", lambda device: CLASSES["cuda:80"])
    machines._gpu.cache_clear()
    assert not machines.is_calibrated("cuda:0") and machines.gpu("cuda:0") == gpus.constants(CLASSES["cuda:80"])
    path = machines.keep({"bandwidth": 1.3e12, "latency": 6e-7}, "cuda:0")
    assert path.is_relative_to(tmp_path) and machines.is_calibrated("cuda:0")
    assert machines.gpu("cuda:0") == gpus.constants(CLASSES["cuda:80"]) | {"bandwidth": 1.3e12, "latency": 6e-7}
    for damaged in ("", "[]", '{"constants": 3}', '{"constants": {"bandwidth": "fast"}}', json.dumps({"constants": {"bandwidth": -1, "colour": 2}})):
        path.write_text(damaged)
        machines._gpu.cache_clear()
        assert machines.gpu("cuda:0") == gpus.constants(CLASSES["cuda:80"])
    machines._gpu.cache_clear()


def test_reading_them_imports_no_triton() -> None:
    code = "import sys; from effllm.autotune import machines; machines.gpu('cuda'); assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
