"""Fingerprints: what belongs to them, that they react, and that reading them is lazy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from effllm.autotune import fingerprint
from effllm.errors import TuneError

H200 = {
    "name": "NVIDIA H200", "multi_processor_count": 132, "major": 9, "minor": 0, "memory_clock_rate": 3201000, "memory_bus_width": 6144,
    "shared_memory_per_multiprocessor": 233472, "L2_cache_size": 62914560,
}  # fmt: skip


def test_the_cpu_is_what_torch_uses():
    here = fingerprint.environment("cpu")
    assert here.kind == "cpu" and here.hard["threads"] == torch.get_num_threads() and here.hard["model"]
    assert here.soft["torch"] == torch.__version__ and type(here.soft["torch"]) is str  # torch's own type compares slowly
    assert here.soft["triton"] is None and "+" in here.soft["compiler"]


def test_the_number_of_threads_makes_another_machine():
    before, threads = fingerprint.environment("cpu"), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        after = fingerprint.environment("cpu")
    finally:
        torch.set_num_threads(threads)
    assert before.hard_digest != after.hard_digest and before.soft_digest == after.soft_digest
    assert fingerprint.environment("cpu").hard_digest == before.hard_digest


def test_the_digest_depends_on_values_and_not_on_order():
    assert fingerprint.digest({"a": 1, "b": 2}) == fingerprint.digest({"b": 2, "a": 1})
    assert len({fingerprint.digest({"a": v}) for v in (1, 2, "1", True, None)}) == 5


def test_cache_sizes_are_those_of_data_or_unified_caches(tmp_path: Path):
    for i, (level, kind, size) in enumerate([("1", "Data", "48K"), ("2", "Instruction", "64K"), ("2", "Unified", "2M"), ("3", "Unified", "36608K")]):
        index = tmp_path / "cpu0" / "cache" / f"index{i}"
        index.mkdir(parents=True)
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (index / name).write_text(text + "\n")
    assert [fingerprint.cache_bytes(n, tmp_path) for n in (1, 2, 3, 4)] == [48 << 10, 2 << 20, 36608 << 10, 0]


def test_a_gpu_by_its_properties():
    whole = fingerprint.of_properties(SimpleNamespace(**H200))
    assert (whole.kind, whole.capability, whole.mig) == ("cuda", "9.0", "") and whole.multiprocessors == 132 and whole.bus == 6144
    part = fingerprint.of_properties(SimpleNamespace(**H200 | {"name": "NVIDIA H200 MIG 1g.18gb", "multi_processor_count": 16}))
    assert part.mig == "1g.18gb" and part != whole


@pytest.mark.parametrize("field", [f for f in H200 if f != "name"])
def test_every_property_of_a_gpu_counts(field):
    assert fingerprint.of_properties(SimpleNamespace(**H200)) != fingerprint.of_properties(SimpleNamespace(**H200 | {field: 1}))


def test_a_property_that_torch_lacks_is_zero():
    assert fingerprint.of_properties(SimpleNamespace(name="old")).l2 == 0


def test_the_driver_counts_by_its_major_version(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "_DRIVER", tmp_path / "version")
    assert fingerprint._driver() is None
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version: 12.2.0\n")
    assert fingerprint._driver() == "550"


def test_an_unknown_device_is_an_error_with_the_known_ones():
    with pytest.raises(TuneError, match="cpu, cuda"):
        fingerprint.environment("meta")


def test_importing_the_store_asks_no_device_and_imports_no_triton():
    code = (
        "import sys, torch;"
        "torch.cuda.get_device_properties = torch.cuda.current_device = torch.cuda.is_available = None;"
        "from effllm.autotune import store, artifacts, fingerprint;"
        "assert 'triton' not in sys.modules and not torch.cuda.is_initialized();"
        "assert fingerprint._processor.cache_info().currsize == 0 and fingerprint.cpu_software.cache_info().currsize == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
