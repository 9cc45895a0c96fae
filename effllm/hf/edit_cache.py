"""A transformers cache whose tokens lie in any order, with keys stored for other positions than the tokens have now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from effllm.runtime.edit.slots import Slots
from effllm.runtime.rotary import Rotary, shift_angles, turns


@dataclass
class Tables:
    """Where a forward pass writes, and how keys turn as they are read; all layers share one.

    `write` (Q,) slots of the new tokens. `row` int32 (slots,) and `cos`, `sin` (A, R / 2): the turn of every slot's key. `fresh`: there is
    nothing but the new tokens. `high`: slots to read, None for all of them (a compiled graph). `turned`: some row is not the identity.
    """

    write: Tensor
    row: Tensor
    cos: Tensor
    sin: Tensor
    layout: str
    kernel: str
    fresh: bool = False
    high: int | None = None
    turned: bool = True


class EditLayer(CacheLayerMixin):
    """Keys and values (1, G, slots, D) of one layer. `turns`: keys are rotary in this layer."""

    is_compileable = True
    is_sliding = False

    def __init__(self, tables: Tables, size: int, turns: bool) -> None:
        super().__init__()
        self.tables, self.size, self.turns = tables, size, turns

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for keys and values like these."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (t.new_zeros(*t.shape[:2], self.size, t.shape[3]) for t in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens to their slots; what attention is to see, keys turned to the present positions."""
        t = self.tables
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, t.write, key_states)
        self.values.index_copy_(2, t.write, value_states)
        if t.fresh:
            return key_states, value_states
        keys, values, row = self.keys, self.values, t.row
        if t.high is not None:
            keys, values, row = keys[:, :, : t.high], values[:, :, : t.high], row[: t.high]
        return self.turn(keys, row), values

    def turn(self, keys: Tensor, row: Tensor) -> Tensor:
        """Keys at the present positions. The stored ones stay as they are, so that roundings do not add up."""
        t = self.tables
        if not (self.turns and t.turned):
            return keys
        out: Tensor = torch.ops.effllm.pie_apply(keys, None, row, t.cos, t.sin, t.layout, t.kernel)
        return out

    def stored(self) -> tuple[Tensor, Tensor]:
        """Keys and values by slot, keys as stored."""
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def grow(self, size: int) -> None:
        """Make room for `size` slots."""
        more = size - self.size
        if more <= 0:
            return
        self.size = size
        if self.is_initialized:
            assert self.keys is not None and self.values is not None
            self.keys, self.values = (torch.cat((t, t.new_zeros(*t.shape[:2], more, t.shape[3])), 2) for t in (self.keys, self.values))

    def moved(self, source: Tensor, row: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Copies in another order, keys turned once and for all: slot t holds what source[t] held, nothing where that is negative."""
        assert self.keys is not None and self.values is not None
        t = self.tables
        keys = torch.ops.effllm.pie_apply(self.keys, source, row, cos, sin, t.layout, t.kernel) if self.turns else _gather(self.keys, source)
        return self._padded(keys), self._padded(_gather(self.values, source))

    def _padded(self, t: Tensor) -> Tensor:
        return torch.cat((t, t.new_zeros(*t.shape[:2], max(0, self.size - t.shape[2]), t.shape[3])), 2)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """(keys, offset) of the mask of a first pass; later passes bring their own mask."""
        length = query_length if isinstance(query_length, int) else int(query_length.shape[0])
        return (length, 0) if self.tables.fresh else (self.size, 0)

    def get_seq_length(self) -> int:
        """0: positions are always given."""
        return 0

    def get_max_length(self) -> int:
        """Slots."""
        return self.size

    get_max_cache_shape = get_max_length


def _gather(t: Tensor, source: Tensor) -> Tensor:
    return t.index_select(2, source.clamp_min(0)).masked_fill((source < 0)[:, None], 0)


class EditCache(Cache):
    """One EditLayer per layer of a model, with the tables that they share."""

    def __init__(self, tables: Tables, size: int, turning: tuple[bool, ...]) -> None:
        super().__init__(layers=[EditLayer(tables, size, t) for t in turning])

    @property
    def own(self) -> list[EditLayer]:
        """The layers."""
        return [layer for layer in self.layers if isinstance(layer, EditLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(t.numel() * t.element_size() for layer in self.own for t in (layer.keys, layer.values) if t is not None)

    def use(self, tables: Tables) -> None:
        """Let the next pass write and turn by these tables."""
        for layer in self.own:
            layer.tables = tables

    def tidied(self, slots: Slots, live: set[int]) -> Slots:
        """Nothing to do: free slots are used again."""
        return slots

    def dropped(self, slots: Slots) -> Slots:
        """Nothing to do, as above."""
        return slots

    def snapshot(self) -> list[Any]:
        """The tensors of all layers, to be put back by `restore`."""
        return [(layer.keys, layer.values) for layer in self.own]

    def restore(self, held: list[Any]) -> None:
        """Put tensors back."""
        for layer, (keys, values) in zip(self.own, held, strict=True):
            layer.keys, layer.values = keys, values


def turn_table(shifts: list[int], rotary: Rotary, rows: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of `shifts`, padded with the identity to `rows` rows so that the shape does not follow the edits."""
    cos, sin = turns(shift_angles(shifts + [0] * (rows - len(shifts)), rotary.omega.cpu()), dtype)
    return cos.to(device), sin.to(device)
