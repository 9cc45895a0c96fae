"""A transformers cache in which many sequences share one row of token slots per layer, each in its own extent.

Keys and values lie (heads, slots, head size): a sequence's keys of a head are one run of memory, which attention reads front to back.
(With a token's heads side by side, decoding from memory that is in no cache took twice as long.) Which slots a forward writes is told by
`ArenaCache.batch.where` before it; what it attends to is the segment table's matter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


class Batch:
    """The slots (T,) that the tokens of the coming forward go to, shared by all layers."""

    where: Tensor


class ArenaLayer(CacheLayerMixin):
    """One layer's slots. `update` writes and returns views (1, heads, slots, size) of everything."""

    is_compileable = True
    is_croppable = False

    def __init__(self, slots: int, batch: Batch) -> None:
        super().__init__()
        self.slots, self.batch = slots, batch
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Allocate by the first keys' shape; nothing is read before it is written, and zeros keep what is copied around it finite."""
        value_states = key_states if value_states is None else value_states
        self._k, self._v = (x.new_zeros(x.shape[1], self.slots, x.shape[3]) for x in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys (1, heads, T, size) and values to the batch's slots."""
        del args, kwargs
        if self._k is None or self._v is None:
            self.lazy_initialization(key_states, value_states)
        assert self._k is not None and self._v is not None
        self._k.index_copy_(1, self.batch.where, key_states[0])
        self._v.index_copy_(1, self.batch.where, value_states[0])
        return self._k[None], self._v[None]

    def read(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values (1, heads, length, size) of an extent; views."""
        assert self._k is not None and self._v is not None
        return tuple(x[None, :, start : start + length] for x in (self._k, self._v))  # type: ignore[return-value]

    def copy(self, start: int, to: int, length: int) -> None:
        """Keys and values of an extent to another that does not overlap it."""
        for x in (self._k, self._v):
            if x is not None:
                x[:, to : to + length] = x[:, start : start + length]

    def get_seq_length(self) -> int:
        """0: sequences have lengths, the arena has none; positions are always given."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Never used to build a mask: tables pass as they are."""
        return int(query_length), 0

    def get_max_length(self) -> int:
        """Slots."""
        return self.slots

    get_max_cache_shape = get_max_length


class ArenaCache(Cache):
    """`layers` ArenaLayers of `slots` tokens and one more, where padding tokens are written."""

    def __init__(self, layers: int, slots: int) -> None:
        self.batch = Batch()
        self.slots = slots
        self.own = [ArenaLayer(slots + 1, self.batch) for _ in range(layers)]
        super().__init__(layers=list(self.own))

    def read(self, layer: int, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values (1, heads, length, size) of an extent in a layer; views."""
        return self.own[layer].read(start, length)

    def copy(self, start: int, to: int, length: int) -> None:
        """The same in every layer."""
        for layer in self.own:
            layer.copy(start, to, length)

    def reset(self) -> None:
        """Nothing: a slot is written before it is read."""

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        tensors = [t for layer in self.own for t in (layer._k, layer._v) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)


def device_of(model: Any) -> torch.device:
    """Where a model's inputs go."""
    return next(t.device for t in (*model.parameters(), *model.buffers()))
