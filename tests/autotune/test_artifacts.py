"""Entries travel in torch's compile caches from one process and store to another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from effllm import compat
from effllm.autotune import artifacts
from effllm.autotune.measurement import encode
from effllm.autotune.store import Store
from tests.autotune.made import HERE, key, took

ROOT = Path(__file__).resolve().parents[2]

SAVE = """
import sys, torch, effllm
from effllm.autotune.store import Store
from tests.autotune.made import HERE, key, took
Store(sys.argv[2]).append(took(50.0, 32, of=key(8)))  # measured earlier, by another process
torch.compiler._cache.CacheArtifactManager.clear()
store = Store()
store.append(took(10.0, 64))
store.append(took(None, 128, status="wrong"))
assert Store(sys.argv[2]).find(key(8), environment=HERE)  # used in this process
data, info = torch.compiler.save_cache_artifacts()
assert len(info.artifacts["effllm_tuning"]) == 3, info
open(sys.argv[1], "wb").write(data)
"""
LOAD = """
import os, sys, torch, effllm
for os.environ["XDG_CACHE_HOME"] in sys.argv[2:]:
    for _ in range(2):
        info = torch.compiler.load_cache_artifacts(open(sys.argv[1], "rb").read())
    assert len(info.artifacts["effllm_tuning"]) == 3, info
"""


def run(code: str, cache: Path, *args: object) -> str:
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_entries_travel_to_another_process_and_store(tmp_path):
    run(SAVE, tmp_path / "a", tmp_path / "bundle", tmp_path / "earlier")
    # a store that cannot be written does not stop torch's own caches from loading
    (tmp_path / "c" / "effllm").mkdir(parents=True)
    (tmp_path / "c" / "effllm" / "tuning").write_text("a file in the way")
    said = run(LOAD, tmp_path / "none", tmp_path / "bundle", tmp_path / "b", tmp_path / "a", tmp_path / "c")
    arrived = Store(tmp_path / "b" / "effllm" / "tuning")
    entries = arrived.load()
    assert sorted((m.key.m_bucket, m.config["bn"], m.status) for m in entries) == [(1, 64, "ok"), (1, 128, "wrong"), (8, 32, "ok")]  # loaded twice, kept once
    assert arrived.find(key(), environment=HERE).how == "exact"
    # loading where they came from changes nothing
    assert len(Store(tmp_path / "a" / "effllm" / "tuning").load()) == 3
    assert "is not kept" in said and not (tmp_path / "none").exists()


def test_a_damaged_artifact_is_named_and_skipped(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.warns(UserWarning, match="artifact k is skipped: the checksum"):
        artifacts.load("k", encode(took(1.0)).replace(b'"bn":64', b'"bn":65'))
    assert not list(tmp_path.rglob("*.jsonl"))
    artifacts.load("k", encode(took(1.0)))
    assert len(list(tmp_path.rglob("*.jsonl"))) == 1


def test_a_torch_without_the_interface_gives_a_reason_and_keeps_working(tmp_path, monkeypatch):
    assert artifacts.unavailable() == ""
    monkeypatch.setitem(sys.modules, "torch.compiler._cache", None)
    assert "no extensible cache artifacts" in artifacts.unavailable()
    compat.register_artifact("another", lambda k, c: None)
    assert Store(tmp_path).append(took(1.0)).seq == 1
