"""An edit session's cache in a compressed format: pages are written once and never again.

Attention does not care in which order keys lie, so an edit appends its new tokens behind everything else, wherever in the text they
stand, and hides deleted ones: no page is decoded and packed again, and stored keys keep the positions that they were packed for. What is
turned are keys as they are read. Two things are given back, both exactly: deleted tokens that still lie in the dense ring, at every edit,
and pages in which no token of the text is left, when room is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from effllm.errors import EditError
from effllm.hf.edit_cache import Tables
from effllm.runtime.caches import paging
from effllm.runtime.caches.base import CacheFormat
from effllm.runtime.caches.layer import Layer
from effllm.runtime.edit.slots import Log, Slots


def size_for(fmt: CacheFormat, tokens: int) -> int:
    """Slots of a cache for at least `tokens`."""
    return paging.capacity(fmt, paging.pages_for(fmt, tokens))


class PackedEditLayer(CacheLayerMixin):
    """Keys and values of one layer in a format. `turns`: keys are rotary in this layer."""

    is_compileable = True
    is_sliding = False

    def __init__(self, tables: Tables, fmt: CacheFormat, size: int, turns: bool, bases: list[Tensor] | None = None) -> None:
        super().__init__()
        self.tables, self.turns = tables, turns
        self.held = Layer(fmt, size, bases)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for keys and values like these. Raises CacheError (E-KVC-SHAPE) where the format does not fit them."""
        self.held.allocate(key_states, value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the new tokens; what attention is to see: old tokens as stored, new ones exact, keys turned to the present positions."""
        t = self.tables
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.held.append(key_states, value_states)
        if t.fresh:
            return key_states, value_states
        keys, values = self.held.read()
        if key_states.shape[2] > self.held.format.window + 1:  # so many are always dense
            keys, values = keys.index_copy(2, t.write, key_states), values.index_copy(2, t.write, value_states)
        row = t.row
        if t.high is not None:
            keys, values, row = keys[:, :, : t.high], values[:, :, : t.high], row[: t.high]
        return self.turn(keys, row), values

    def turn(self, keys: Tensor, row: Tensor) -> Tensor:
        """Keys at the present positions. The stored ones stay as they are."""
        t = self.tables
        if not (self.turns and t.turned):
            return keys
        out: Tensor = torch.ops.effllm.pie_apply(keys, None, row, t.cos, t.sin, t.layout, t.kernel)
        return out

    def stored(self) -> tuple[Tensor, Tensor]:
        """Keys and values by slot, decoded, keys at the positions that they were stored for."""
        return self.held.read()

    def grow(self, size: int) -> None:
        """Make room for `size` slots, a size that `size_for` gives."""
        self.held.capacity = size
        if self.is_initialized:
            pages = self.held.pages
            more = paging.pages_for(self.held.format, size) - pages.shape[1]
            self.held.pages = torch.cat([pages, pages.new_zeros(pages.shape[0], more, pages.shape[2])], 1)
            self.held._static()

    def moved(self, *args: Tensor) -> tuple[Tensor, Tensor]:
        """Refused: packed keys are not rewritten."""
        raise eager_refused(self.held.format.spec)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """(keys, offset) of the mask of a first pass; later passes bring their own mask."""
        length = query_length if isinstance(query_length, int) else int(query_length.shape[0])
        return (length, 0) if self.tables.fresh else (self.held.full, 0)

    def get_seq_length(self) -> int:
        """0: positions are always given."""
        return 0

    def get_max_length(self) -> int:
        """Slots."""
        return self.held.full

    get_max_cache_shape = get_max_length


class PackedEditCache(Cache):
    """One PackedEditLayer per layer of a model, all with the same lengths."""

    def __init__(self, tables: Tables, fmt: CacheFormat, size: int, turning: tuple[bool, ...], bases: dict[int, list[Tensor]]) -> None:
        """`bases[i]`: constant tensors of layer i's format."""
        self.format = fmt
        super().__init__(layers=[PackedEditLayer(tables, fmt, size, t, bases.get(i)) for i, t in enumerate(turning)])

    @property
    def own(self) -> list[PackedEditLayer]:
        """The layers."""
        return [layer for layer in self.layers if isinstance(layer, PackedEditLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(layer.held.nbytes for layer in self.own)

    def use(self, tables: Tables) -> None:
        """Let the next pass turn by these tables."""
        for layer in self.own:
            layer.tables = tables

    def snapshot(self) -> list[Any]:
        """What an append changes and later ones need, to be put back by `restore`: pages behind the present ones mean nothing."""
        return [(layer.held.ring.clone(), layer.held.lens.clone()) for layer in self.own]

    @torch.no_grad()
    def restore(self, state: list[Any]) -> None:
        """Forget what was appended since, in place."""
        for layer, (ring, lens) in zip(self.own, state, strict=True):
            layer.held.ring.copy_(ring)
            layer.held.lens.copy_(lens)

    @torch.no_grad()
    def tidied(self, slots: Slots, live: set[int]) -> Slots:
        """Close the gaps that slots outside of `live` leave in the ring. Exact; to be undone by `restore`."""
        assert isinstance(slots, Log)
        flushed = int(self.own[0].held.lens[1])
        keep = [s for s in range(flushed, slots.used) if s in live]
        if len(keep) == slots.used - flushed:
            return slots
        index = {s: flushed + i for i, s in enumerate(keep)}
        self._ring(torch.tensor(keep, dtype=torch.long), flushed, 0)
        return slots.moved([s if s < flushed else index.get(s, -1) for s in range(slots.used)], flushed + len(keep))

    @torch.no_grad()
    def dropped(self, slots: Slots) -> Slots:
        """Give pages back in which no token of the text is left: the last pages move there. Exact, and as before where it raises."""
        assert isinstance(slots, Log)
        page, filled = self.format.page, int(self.own[0].held.lens[1]) // self.format.page
        dead = slots.dead(page, filled)
        if not dead:
            return slots
        now = filled - len(dead)
        holes = [p for p in dead if p < now]
        last = [p for p in range(now, filled) if p not in set(dead)]
        to = {p: p for p in range(now)} | dict(zip(last, holes, strict=True))
        before = self.snapshot()
        try:
            for layer in self.own:
                if holes:
                    layer.held.pages[:, holes] = layer.held.pages[:, last]  # only dead pages are written
            self._ring(torch.arange(filled * page, slots.used), now * page, len(dead) * page)
        except BaseException:
            self.restore(before)
            raise
        packed = [to[s // page] * page + s % page if s // page in to and s // page not in dead else -1 for s in range(filled * page)]
        return slots.moved([*packed, *range(now * page, slots.used - len(dead) * page)], slots.used - len(dead) * page)

    def _ring(self, keep: Tensor, first: int, fewer: int) -> None:
        """Slots `keep` of the ring become slots first, first + 1, ..; `fewer` tokens are in pages."""
        for layer in self.own:
            held = layer.held
            width = held.ring.shape[3]
            at = keep.to(held.ring.device)
            now = torch.arange(first, first + len(keep), device=at.device)
            held.ring[:, :, :, now % width] = held.ring[:, :, :, at % width]
            held.lens.sub_(fewer)
            held.lens[0] = first + len(keep)


def eager_refused(spec: str) -> EditError:
    """The error for rewriting packed keys."""
    cause = f"{spec} keeps keys packed, and rewriting them would round them again at every edit"
    return EditError("E-EDT-CACHE", cause, 'use form="lazy", or cache="dense"')
