"""What the teacher says of the recovery data: asked anew at every step, or once and kept in memory or on disk.

Kept are the hidden states that enter the teacher's head (d numbers per token instead of a vocabulary of logits; the logits come
out of them exactly again) and the block outputs for feature matching, in bf16.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from effllm.errors import CheckpointError, RecoveryError
from effllm.recovery.data import Data
from effllm.recovery.data import data as read
from effllm.recovery.forward import Body, block_names
from effllm.runtime.atomic import staged_directory

Ask = Callable[[list[int]], "Answer"]
Evaluating = Callable[[nn.Module], AbstractContextManager[Any]]


@dataclass
class Answer:
    """Of one micro-batch: hidden states (rows, d) that `logits` turns into logits, and block outputs (batch, T, d)."""

    hidden: Tensor
    features: list[Tensor]
    logits: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Targets:
    """A teacher's answers to data, by item. `folder` holds them on disk, `kept` in memory; exactly one is set.

    fingerprint: of the data; features: names of the blocks; vocabulary: width of the logits; weight (vocabulary, d) and bias of the
    head, both None where the hidden states are logits themselves.
    """

    fingerprint: str
    features: tuple[str, ...]
    vocabulary: int
    weight: Tensor | None
    bias: Tensor | None
    folder: Path | None = None
    kept: tuple[dict[str, Tensor], ...] = ()

    def item(self, index: int) -> dict[str, Tensor]:
        """hidden (1, T, d) and one feature.<i> per block."""
        return self.kept[index] if self.folder is None else load_file(self.folder / f"{index:06d}.safetensors")

    def answer(self, indices: list[int]) -> Answer:
        """The items with these indices as one batch."""
        found = [self.item(i) for i in indices]
        hidden = torch.cat([x["hidden"] for x in found])
        features = [torch.cat([x[f"feature.{i}"] for x in found]) for i in range(len(self.features))]
        return Answer(hidden.flatten(0, -2), features, self.logits)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states."""
        if self.weight is None:
            return hidden
        return F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)

    @property
    def nbytes(self) -> int:
        """Bytes of the answers."""
        if self.folder is not None:
            return sum(p.stat().st_size for p in self.folder.iterdir())
        return sum(t.numel() * t.element_size() for item in self.kept for t in item.values())


@torch.no_grad()
def cache_targets(
    teacher: nn.Module,
    data: Any,
    *,
    features: int | None = 4,
    directory: str | Path | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Targets:
    """Run the teacher once over the recovery data and keep what it says.

    data: as for `recover`; features: number of blocks to keep, evenly spaced, None for all; directory: written as a whole or not at
    all, else the answers stay in memory. Raises CalibrationError (E-CAL-*) and RecoveryError (E-REC-OUTPUT).
    """
    items = read(data, 1, 1)
    was = [(m, m.training) for m in teacher.modules()]
    teacher.eval()
    try:
        body = Body(teacher, items.items[0], block_names(teacher, features))
        head = body.head if isinstance(body.head, nn.Linear) else None
        weight = None if head is None else head.weight.detach()
        bias = None if head is None or head.bias is None else head.bias.detach()

        def ask(index: int) -> dict[str, Tensor]:
            if progress is not None:
                progress(index, len(items.items), "teacher")
            hidden, seen = body(items.items[index])
            kept = {"hidden": hidden if head is not None else body.logits(hidden)} | {f"feature.{i}": f for i, f in enumerate(seen)}
            return {k: t.to(torch.bfloat16, copy=True).cpu() for k, t in kept.items()}

        made = (items.fingerprint(), body.features, body.shape[-1])
        if directory is None:
            own = None if weight is None else weight.clone(), None if bias is None else bias.clone()
            return Targets(*made, *own, kept=tuple(ask(i) for i in range(len(items.items))))
        folder = Path(directory)
        with staged_directory(folder) as staging:
            for i in range(len(items.items)):
                save_file(ask(i), staging / f"{i:06d}.safetensors")
            tensors = {k: t.contiguous().cpu() for k, t in (("weight", weight), ("bias", bias)) if t is not None}
            save_file(tensors, staging / "head.safetensors")
            about = {"version": 1, "fingerprint": made[0], "features": list(made[1]), "vocabulary": made[2], "items": len(items.items)}
            (staging / "targets.json").write_text(json.dumps(about, indent=1))
        return load_targets(folder)
    finally:
        for module, training in was:
            module.training = training


def load_targets(directory: str | Path) -> Targets:
    """Answers that `cache_targets` wrote. CheckpointError (E-CKP-TARGETS) where they cannot be read."""
    folder = Path(directory)
    try:
        about = json.loads((folder / "targets.json").read_text())
        head = load_file(folder / "head.safetensors")
        if about["version"] != 1 or not all((folder / f"{i:06d}.safetensors").is_file() for i in range(about["items"])):
            raise ValueError("an unknown version, or files are missing")
        return Targets(about["fingerprint"], tuple(about["features"]), about["vocabulary"], head.get("weight"), head.get("bias"), folder)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError("E-CKP-TARGETS", f"{folder} holds no teacher's answers: {error}", "write them again with cache_targets") from error


def asker(teacher: nn.Module | Targets, items: Data, student: Body, features: tuple[str, ...]) -> Ask:
    """How to get the answers for item indices; checks that the teacher fits the student and the data (E-REC-TEACHER)."""
    if isinstance(teacher, Targets):
        if teacher.fingerprint != items.fingerprint():
            raise RecoveryError("E-REC-TEACHER", "the teacher's answers are to other data", "make them with cache_targets on this data")
        missing = sorted(set(features) - set(teacher.features))
        _fits(teacher.vocabulary, student, missing)
        return lambda indices: _only(teacher.answer(indices), teacher.features, features)
    names = {n for n, _ in teacher.named_modules()}
    _fits(None, student, sorted(set(features) - names))
    try:
        body = Body(teacher, items.join(items.micro(0, 0)), features)
    except (RuntimeError, IndexError) as error:
        raise RecoveryError("E-REC-TEACHER", f"the teacher does not run on the recovery data: {error}", "give the dense model that was compressed") from error
    if body.shape != student.shape:
        _fits(body.shape[-1], student, [])
        raise RecoveryError("E-REC-TEACHER", f"the teacher's logits are {body.shape}, the model's {student.shape}", "give the dense model that was compressed")

    def ask(indices: list[int]) -> Answer:
        with torch.no_grad():
            hidden, seen = body(items.join(indices))
        return Answer(hidden.flatten(0, -2), seen, body.logits)

    return ask


def _only(answer: Answer, have: tuple[str, ...], want: tuple[str, ...]) -> Answer:
    return Answer(answer.hidden, [answer.features[have.index(name)] for name in want], answer.logits)


def _fits(vocabulary: int | None, student: Body, missing: list[str]) -> None:
    advice = "give the dense model that was compressed"
    if vocabulary is not None and vocabulary != student.shape[-1]:
        raise RecoveryError("E-REC-TEACHER", f"the teacher has a vocabulary of {vocabulary}, the model one of {student.shape[-1]}", advice)
    if missing:
        raise RecoveryError("E-REC-TEACHER", f"the teacher has no block {missing[0]} to compare with", f"{advice}, or leave the features out: features=0")
