"""Checkpoints of a recovery: masters, moments and generator as safetensors, everything else as JSON, in a directory that appears as a whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from effllm.errors import CheckpointError, RecoveryError
from effllm.recovery.optimizer import Masters
from effllm.runtime.atomic import staged_directory

_VERSION = 1


def save(folder: Path, masters: Masters, generator: torch.Generator, step: int, settings: Mapping[str, Any], history: list[dict[str, Any]]) -> None:
    """Write the state after `step` steps in the place of an older one. CheckpointError (E-CKP-WRITE)."""
    tensors = {k: t.detach().contiguous().cpu() for k, t in masters.state().items()} | {"generator": generator.get_state()}
    about = {"version": _VERSION, "step": step, "settings": dict(settings), "scales": masters.scales, "history": history}
    try:
        with staged_directory(folder) as staging:
            save_file(tensors, staging / "state.safetensors")
            (staging / "state.json").write_text(json.dumps(about, indent=1))
    except OSError as error:
        raise CheckpointError("E-CKP-WRITE", f"cannot write the state of the recovery to {folder}: {error}", "give a folder that can be written") from error


def load(folder: Path, masters: Masters, generator: torch.Generator, settings: Mapping[str, Any]) -> tuple[int, list[dict[str, Any]]]:
    """Continue from a folder: sets masters, parameters and generator; returns the steps done and the history.

    Raises CheckpointError (E-CKP-RECOVERY) for a folder that cannot be read and RecoveryError (E-REC-RESUME) for one of another run.
    """
    try:
        about = json.loads((folder / "state.json").read_text())
        tensors: dict[str, Tensor] = load_file(folder / "state.safetensors")
        version, step, saved, scales, history = (about[k] for k in ("version", "step", "settings", "scales", "history"))
        state = tensors.pop("generator")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError("E-CKP-RECOVERY", f"{folder} holds no state of a recovery: {error}", "start again without resume") from error
    if version != _VERSION:
        raise CheckpointError("E-CKP-RECOVERY", f"{folder} has version {version}, this release reads {_VERSION}", "start again without resume")
    wanted = json.loads(json.dumps(dict(settings)))
    differ = sorted(k for k in wanted.keys() | saved.keys() if wanted.get(k) != saved.get(k))
    if differ:
        k = differ[0]
        cause = f"the state in {folder} is of a run with {k}={saved.get(k)!r}, this one has {wanted.get(k)!r}"
        raise RecoveryError("E-REC-RESUME", cause, "resume with the same model, data and options, or start again without resume")
    shapes = {f"master.{n}": x.shape for n, x in masters.x.items()}
    if {k: t.shape for k, t in tensors.items() if k.startswith("master.")} != shapes:
        raise RecoveryError("E-REC-RESUME", f"the state in {folder} is of other parameters", "resume with the model that the run started from")
    masters.load(tensors, scales)
    generator.set_state(state)
    return step, history
