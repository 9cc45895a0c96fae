"""A save is whole or has not happened: refused targets, failures in the middle, a killed process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from effllm.errors import CheckpointError
from effllm.runtime import atomic, shards
from effllm.runtime.checkpoint import load, save
from effllm.runtime.weights import BipolarWeight
from tests.runtime.checkpoints import logits, pattern, skeleton, small


def refused(model: nn.Module, target: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        save(model, target)
    return caught.value.code


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_target_that_is_something_else_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    before = content(tmp_path)
    assert refused(small(), tmp_path / "thesis") == "E-CKP-WRITE"
    assert refused(small(), tmp_path / "file") == "E-CKP-WRITE"
    assert refused(small(), tmp_path / "file" / "below") == "E-CKP-WRITE"
    assert content(tmp_path) == before and not list(tmp_path.glob(".*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_parent_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert refused(small(), tmp_path / "m") == "E-CKP-WRITE"


def test_an_empty_directory_and_missing_parents_are_fine(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        save(small(), target)
        assert torch.equal(logits(load(target, model=skeleton(), kernel="reference")), logits(small()))
        assert os.listdir(target.parent).count(target.name) == 1


@pytest.mark.parametrize("can_exchange", [True, False])
def test_overwriting_takes_the_place_of_the_old_and_keeps_foreign_files(tmp_path: Path, can_exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_exchange:
        monkeypatch.setattr(atomic, "exchange", lambda a, b: False)
    save(small(), tmp_path / "m", shard_bytes=500)
    (tmp_path / "m" / "notes.txt").write_text("mine")
    (tmp_path / "m" / "extra").mkdir()
    (tmp_path / "m" / "extra" / "more.txt").write_text("too")
    new = small(proj=pattern(40, 40, 2, "symmetric"))
    save(new, tmp_path / "m")
    assert torch.equal(logits(load(tmp_path / "m", model=skeleton(), kernel="reference")), logits(new))
    assert sorted(content(tmp_path / "m")) == ["effllm-00001.safetensors", "effllm.json", "extra/more.txt", "notes.txt"]
    assert os.listdir(tmp_path) == ["m"]


def test_a_failure_in_the_middle_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(small(), tmp_path / "m")
    before = content(tmp_path)
    calls = iter(range(100))
    original = shards.digest

    def fails(t: torch.Tensor, sliced: bool) -> str | list[str]:
        if next(calls) == 3:
            raise OSError(28, "No space left on device")
        return original(t, sliced)

    monkeypatch.setattr(shards, "digest", fails)
    assert refused(small(proj=pattern(40, 40, 2, "symmetric")), tmp_path / "m") == "E-CKP-WRITE"
    assert content(tmp_path) == before and os.listdir(tmp_path) == ["m"]


def test_a_failed_rename_without_exchange_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(small(), tmp_path / "m")
    before = content(tmp_path)
    monkeypatch.setattr(atomic, "exchange", lambda a, b: False)
    original = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError(5, "Input/output error")
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    assert refused(small(), tmp_path / "m") == "E-CKP-WRITE"
    assert content(tmp_path) == before


def test_a_killed_process_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    save(small(), tmp_path / "m")
    before = content(tmp_path / "m")
    code = "import os, signal, sys; from tests.runtime.checkpoints import *; from effllm.runtime import checkpoint, shards\n"
    code += "original, left = shards.digest, [4]\n"
    code += "def digest(t, sliced):\n    left[0] -= 1\n    if not left[0]: os.kill(os.getpid(), signal.SIGKILL)\n    return original(t, sliced)\n"
    code += "shards.digest = digest\ncheckpoint.save(small(proj=pattern(40, 40, 2, 'symmetric')), sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -signal.SIGKILL
    assert content(tmp_path / "m") == before
    assert torch.equal(logits(load(tmp_path / "m", model=skeleton(), kernel="reference")), logits(small()))
    (left,) = tmp_path.glob(".m.*.tmp")
    assert any(left.iterdir())
    alive = left.with_name(re.sub(r"-\d+-", f"-{os.getppid()}-", left.name))
    elsewhere = left.with_name(re.sub(r"\.[0-9a-f]{8}-", ".00000000-", left.name))
    other_target = left.with_name(left.name.replace(".m.", ".mm."))
    foreign = tmp_path / ".m.notes.tmp"
    for kept in (alive, elsewhere, other_target, foreign):
        kept.mkdir()
    save(small(), tmp_path / "m")
    assert not left.exists()
    # of a living process, of another machine, of another target, of somebody else
    assert {p.name for p in tmp_path.glob(".m*")} == {p.name for p in (alive, elsewhere, other_target, foreign)}


def test_a_checkpoint_that_was_moved_aside_is_not_stale(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    with atomic.staged_directory(tmp_path / "m") as staging:
        aside = staging.with_name(staging.name.replace(f"-{os.getpid()}-", f"-{gone.pid}-").replace(".tmp", ".old"))
        aside.mkdir()
        assert atomic.remove_stale(tmp_path / "m") == [] and aside.exists()  # killed between two renames: the only copy
    assert atomic.remove_stale(tmp_path / "m") == [aside] and not aside.exists()


def test_models_that_cannot_be_saved(tmp_path: Path) -> None:
    assert refused(skeleton(), tmp_path / "m") == "E-CKP-WRITE"
    assert refused(nn.Sequential(BipolarWeight(pattern(8, 32, 2, "symmetric"), kernel="reference")), tmp_path / "m") == "E-CKP-MODULE"
    assert os.listdir(tmp_path) == []
