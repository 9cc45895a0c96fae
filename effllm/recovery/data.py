"""Recovery data: items (token windows, or ready batches), their order as a function of the seed, and their fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from effllm.errors import CalibrationError
from effllm.recovery.loss import next_tokens
from effllm.solvers import blocks
from effllm.solvers.blocks import Batch


@dataclass(frozen=True)
class Data:
    """Items (one window or one given batch each) and how many of them make one forward pass."""

    items: list[Batch]
    batch: int

    def micro(self, position: int, seed: int) -> list[int]:
        """Indices of the items of micro-batch number `position`: each epoch is a permutation of its own."""
        return [self._at(position * self.batch + i, seed) for i in range(self.batch)]

    def _at(self, place: int, seed: int) -> int:
        epoch, within = divmod(place, len(self.items))
        return int(_permutation(len(self.items), seed, epoch)[within])

    def join(self, indices: list[int]) -> Batch:
        """One model input of the items with these indices."""
        found = [self.items[i] for i in indices]
        return torch.cat([x for x in found if isinstance(x, Tensor)]) if self.batch > 1 else found[0]

    def fingerprint(self) -> str:
        """Changes with any token of any item."""
        digest = hashlib.sha256()
        for item in self.items:
            for key, value in sorted(_named(item).items()):
                digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode() if isinstance(value, Tensor) else f"{key}{value}".encode())
                if isinstance(value, Tensor):
                    digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def data(source: Any, batch: int, per_step: int) -> Data:
    """Items of `source`: token ids (windows, length), grouped by `batch`, or an iterable of model inputs, one per forward pass.

    CalibrationError: E-CAL-FORM, E-CAL-SHORT where there are fewer windows than one step reads (`per_step` micro-batches), or
    windows of fewer than two tokens.
    """
    items = blocks.batches(source)
    windows = isinstance(source, Tensor)
    size = batch if windows else 1
    if len(items) < size * per_step:
        cause = f"the recovery data is too short: {len(items)} items, and one step reads {size * per_step}"
        raise CalibrationError("E-CAL-SHORT", cause, "give a longer text, or a smaller batch")
    if any(x.shape[-1] < 2 for x in items if isinstance(x, Tensor) and x.dim() > 1):
        raise CalibrationError("E-CAL-SHORT", "the recovery data is too short: windows of fewer than two tokens", "give longer windows")
    return Data(items, size)


def targets_of(item: Batch, rows: int) -> tuple[Tensor, Tensor]:
    """(next tokens (rows,) with -100 for none, mask (rows,) fp32) of a batch whose logits have that many rows.

    Labels are taken as transformers gives them (shifted by the model for a decoder, as they are beside decoder inputs).
    """
    named = _named(item)
    ids = named.get("decoder_input_ids", named.get("input_ids"))
    pad = named.get("decoder_attention_mask" if "decoder_input_ids" in named else "attention_mask")
    labels = named.get("labels")
    if isinstance(labels, Tensor) and labels.numel() == rows:
        following = labels if "decoder_input_ids" in named else next_tokens(labels, None)
    elif isinstance(ids, Tensor) and ids.numel() == rows and not ids.is_floating_point():
        following = next_tokens(ids.reshape(-1, ids.shape[-1]), pad if isinstance(pad, Tensor) and pad.shape == ids.shape else None)
    else:
        following = torch.full((1, rows), -100)
    mask = pad.reshape(-1).float() if isinstance(pad, Tensor) and pad.numel() == rows else torch.ones(rows)
    return following.reshape(-1), mask


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63))


def _named(item: Batch) -> Mapping[str, Any]:
    return {"input_ids": item} if isinstance(item, Tensor) else item
