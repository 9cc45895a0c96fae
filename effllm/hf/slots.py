"""A static cache that can be set back: transformers' static layers, all of one capacity, with writes from any slot on.

What lies behind the length is never read (the causal mask hides it) and is overwritten by what comes next, so going back is a matter of
one number a layer. Sliding-window layers are held in full, too, since a ring buffer forgets what a rollback would need; the model's own mask
applies the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import StaticLayer


class Slots(Cache):
    """Keys and values of `capacity` tokens for every layer; `length` of them are filled."""

    def __init__(self, layers: int, capacity: int) -> None:
        with torch.inference_mode(False):  # tensors made under inference_mode could not be updated outside of it
            self.own = [StaticLayer(capacity) for _ in range(layers)]
            super().__init__(layers=list(self.own))
        self.capacity = capacity
        self.replays: dict[Any, Any] = {}  # compiled steps as they were recorded on this cache
        self.latest: Any = None  # of those, the one that ran last, if it is a native program and nothing else
        self.length = 0

    def allocate(self, model: Any, batch: int) -> None:
        """What the first forward does by itself if it is not compiled."""
        config = model.config.get_text_config(decoder=True)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        device = next(t.device for t in (*model.parameters(), *model.buffers()))
        with torch.inference_mode(False):
            self.early_initialization(batch, heads, size, model.dtype, device)

    @torch.no_grad()
    def seek(self, length: int) -> None:
        """The next token goes to slot `length`; what lies from there on is forgotten."""
        self.length = length
        for layer in self.own:
            layer.cumulative_length.fill_(length)

    @torch.no_grad()
    def compact(self, start: int, slots: Sequence[int]) -> None:
        """Move the tokens of `slots` (ascending, at or behind `start`) to start, start + 1, ...; then continue behind them."""
        if list(slots) != list(range(start, start + len(slots))):
            first = self.own[0].keys
            assert first is not None
            index = torch.tensor(list(slots), device=first.device)
            for layer in self.own:
                for t in (layer.keys, layer.values):
                    assert t is not None
                    t[:, :, start : start + len(slots)] = t.index_select(2, index)
        self.seek(start + len(slots))

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        tensors = [t for layer in self.own if layer.is_initialized for t in (layer.keys, layer.values)]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def bucket(tokens: int, longest: int, least: int = 256) -> int:
    """A capacity for that many tokens out of few: powers of two from `least`, or the model's `longest` sequence where that suffices."""
    size = max(least, 1 << (tokens - 1).bit_length())
    return min(size, longest) if tokens <= longest else size
