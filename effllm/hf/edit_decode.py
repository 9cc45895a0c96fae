"""The decode step of an edit session, compiled once: its shapes do not follow the edits."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Compile = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]


class Decoder:
    """One token at a time. `compile` wraps the step function; None runs it as it is."""

    def __init__(self, model: Any, compile: Compile | None) -> None:
        self.model, self.compiled = model, compile is not None
        # a code object of its own: Dynamo keeps compiled graphs per code object, and sessions must not see each other's
        own = types.FunctionType(_step.__code__.replace(), _step.__globals__, _step.__name__)
        self._step: Callable[..., Tensor] = own if compile is None else compile(own)

    def step(self, token: int, position: int, mask: Tensor, cache: Any) -> Tensor:
        """Logits (V,) behind a token at a position; `mask` (1, 1, 1, slots)."""
        ids, at = (torch.tensor([[i]], device=mask.device) for i in (token, position))
        return self._step(self.model, ids, at, mask, cache)


def _step(model: Any, ids: Tensor, positions: Tensor, mask: Tensor, cache: Any) -> Tensor:
    logits: Tensor = model(input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[0, -1]
