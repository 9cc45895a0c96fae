"""One forward over a flattened batch of sequences: whole prompts, chunks of prompts and decoding steps, side by side.

    engine = Engine(model, slots=4096)
    row = engine.open(capacity=600)                 # room for 600 tokens of one sequence
    logits = engine.run([Piece(row, ids)])          # (1, V): after the last of ids

Linears see one matrix of all tokens; attention goes by segments (runtime/segments.py). Nothing is padded, unless `pad_to` asks for sizes
that a compiled graph knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from effllm import compat
from effllm.errors import PromptError
from effllm.hf import segments
from effllm.hf.arena_cache import ArenaCache, device_of
from effllm.runtime.arena import Extents
from effllm.runtime.segments import Segment, table

_LAYERS = ("full_attention", "sliding_attention")
_ALONE = "use the model's own generate"
# frequencies that depend on the longest position of the batch: one long sequence would change the short ones beside it
_BY_LENGTH = ("dynamic", "longrope")


@dataclass
class Row:
    """A sequence in the arena: its extent, and how many tokens of it are filled."""

    start: int
    capacity: int
    length: int = 0


@dataclass(frozen=True)
class Piece:
    """The next tokens (n,) of a sequence; `logits`: whether those after the last one are wanted."""

    row: Row
    ids: Tensor
    logits: bool = True


class Engine:
    """Runs pieces through a causal LM of transformers, eager or compiled by torch.compile, with keys and values for `slots` tokens in all."""

    def __init__(self, model: Any, slots: int, pad_to: Callable[[int], int] | None = None) -> None:
        """`pad_to(tokens)` gives the number of tokens to compute. Raises PromptError (E-PRM-MODEL, E-PRM-ATTENTION)."""
        self.model = model
        self.inner = getattr(model, "_orig_mod", model)
        why = refusal(self.inner)
        if why:
            raise PromptError("E-PRM-MODEL", why, _ALONE)
        self.config = self.inner.config.get_text_config(decoder=True)
        self.device = device_of(self.inner)
        self.limit, self.vocabulary = limit(self.config), vocabulary(self.inner)
        self.cache = ArenaCache(self.config.num_hidden_layers, slots)
        self._extents = Extents(slots)
        self._attending = segments.Attending(self.inner)
        self._pad = pad_to
        self._proved = False

    @property
    def free(self) -> int:
        """Slots in no sequence."""
        return self._extents.free

    def open(self, capacity: int) -> Row | None:
        """Room for a sequence of `capacity` tokens; None while there is none."""
        start = self._extents.take(capacity)
        return None if start is None else Row(start, capacity)

    def close(self, row: Row) -> None:
        """Give a sequence's slots back."""
        self._extents.give(row.start)

    def grow(self, row: Row, capacity: int) -> bool:
        """Room for `capacity` tokens of a sequence, where it lies or, copied, elsewhere; False where there is no such room."""
        if not self._extents.extend(row.start, capacity):
            start = self._extents.take(capacity)
            if start is None:
                return False
            self.cache.copy(row.start, start, row.length)
            self._extents.give(row.start)
            row.start = start
        row.capacity = max(capacity, row.capacity)
        return True

    def export(self, row: Row, cache: Any = None) -> Any:
        """A sequence's keys and values as a transformers cache of their own, copied: into `cache`, fresh, of any kind with `update`, or into a
        DynamicCache. A compressing cache so packs one whole prompt, exact until then, and its pages never straddle two."""
        cache = DynamicCache(config=self.config) if cache is None else cache
        for layer in range(len(self.cache.own)):
            k, v = self.cache.read(layer, row.start, row.length)
            cache.update(k.clone(), v.clone(), layer)
        return cache

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Logits (wanted pieces, V) after each wanted piece's last token. Rows grow only when the forward succeeded.

        Raises PromptError (E-PRM-CAPACITY) for a piece past its row's capacity or the model's positions.
        """
        ids, positions, where, found, last, end = [], [], [], [], [], 0
        for p in pieces:
            n, row = len(p.ids), p.row
            if row.length + n > row.capacity or row.length + n > self.limit:
                cause = f"{row.length} + {n} tokens in a row of {row.capacity} (the model's positions end at {self.limit})"
                raise PromptError("E-PRM-CAPACITY", cause, "give a shorter prompt, or a larger capacity")
            ids.append(p.ids)
            positions.append(torch.arange(row.length, row.length + n))
            found.append(Segment(end, n, row.start, row.length + n))
            end += n
            if p.logits:
                last.append(end - 1)
        total = end if self._pad is None else max(end, self._pad(end))
        where = [torch.arange(s.k_start + s.k_len - s.q_len, s.k_start + s.k_len) for s in found]
        if total > end:
            zeros = torch.zeros(total - end, dtype=torch.int64)
            ids, positions, where = [*ids, zeros], [*positions, zeros], [*where, zeros + self.cache.slots]
        rows = table(found, total, self.cache.slots)
        logits = self._forward(torch.cat(ids), torch.cat(positions), torch.cat(where), rows, torch.tensor(last, dtype=torch.int64))
        for p in pieces:
            p.row.length += len(p.ids)
        return logits

    @torch.no_grad()
    def _forward(self, ids: Tensor, positions: Tensor, where: Tensor, segment_table: Tensor, last: Tensor) -> Tensor:
        to = self.device
        self.cache.batch.where = where.to(to)
        before = segments.calls()
        forward = self.model if self._proved else self.inner.forward
        with self._attending.on():
            logits: Tensor = forward(
                input_ids=ids[None].to(to), position_ids=positions[None].to(to), attention_mask=segment_table[None, None].to(to),
                past_key_values=self.cache, use_cache=True, logits_to_keep=last.to(to),
            ).logits  # fmt: skip
        if not self._proved:
            through = segments.calls() - before
            if through != self.config.num_hidden_layers:
                cause = f"{through} of {self.config.num_hidden_layers} layers of {type(self.inner).__name__} asked the attention registry"
                raise PromptError("E-PRM-MODEL", cause, _ALONE)
            self._proved = True
        return logits[0]


def limit(config: Any) -> int:
    """The most tokens that a sequence may have."""
    most = getattr(config, "max_position_embeddings", None) or 1 << 30
    rope = getattr(config, "rope_parameters", None) or {}
    scalings = [rope, *(v for v in rope.values() if isinstance(v, dict))]
    for scaling in scalings:
        if scaling.get("rope_type") in _BY_LENGTH:
            most = min(most, scaling.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None) or most)
    return int(most)


def vocabulary(model: Any) -> int | None:
    """Rows of the model's embedding, where it tells."""
    find = getattr(model, "get_input_embeddings", None)
    found: int | None = getattr(find() if find is not None else None, "num_embeddings", None)
    return found


def refusal(model: Any) -> str:
    """Why sequences of this model cannot share a forward; empty if they can."""
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return f"{name} is no model of transformers"
    text = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        return f"{name} has an encoder"
    if not model.can_generate():
        return f"{name} has no head that generates"
    other = sorted(set(getattr(text, "layer_types", None) or ()) - set(_LAYERS))
    if other:
        return f"{name} has layers of type {', '.join(other)}"
    if not compat.takes_attention(model) or getattr(text, "alibi", False):
        return f"{name} does not look its attention up in the registry"
    return ""
