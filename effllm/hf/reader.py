"""A model on a static cache that reads tokens behind a certain prefix, chained or as a tree, and keeps those that turn out right."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from effllm.hf.arena_cache import device_of
from effllm.hf.engine import limit
from effllm.hf.slots import Slots
from effllm.hf.static_decoding import read
from effllm.hf.steps import Compiled, steps_of
from effllm.hf.tree_mask import TreeMask


class Reader:
    """`length` tokens are in the cache."""

    cache: Slots

    def __init__(self, model: Any, compiled: Compiled | None, trees: bool) -> None:
        self.model, self.static = model, compiled is not None
        self.device = device_of(model)
        self.limit = limit(model.config.get_text_config(decoder=True))
        self.steps = steps_of(model, compiled)
        self._mask = TreeMask(model) if trees else None

    @contextlib.contextmanager
    def on(self, capacity: int, beside: Reader | None = None) -> Iterator[Reader]:
        """With a cache of that many tokens, or with that of another reader."""
        if beside is not None:
            self.cache = beside.cache
            yield self
            return
        with self.steps.borrow(self.model, 1, capacity) as self.cache:
            yield self

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self.cache.length

    def prompt(self, ids: Tensor) -> Tensor:
        """Logits (V,) after a prompt (S,)."""
        return read(self.steps, self.model, self.cache, ids.to(self.device))[0]

    def read(
        self, tokens: Sequence[int], positions: Sequence[int], width: int, sight: Tensor | None = None, slots: Sequence[int] = (), hidden: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (n, V) after each of n tokens, and their last hidden states (n, H) if wanted.

        `width`: rows that a compiled forward has. `sight` (n, m) bool: which of the last m slots, new ones included, each token sees besides
        everything before; their positions are `slots` (m,). None for a chain.
        """
        n, start = len(tokens), self.cache.length
        rows = max(width, n) if self.static else n
        ids = torch.tensor([[*tokens, *[0] * (rows - n)]], device=self.device)
        at = torch.tensor([[*positions, *[positions[-1]] * (rows - n)]], device=self.device)
        mask = None if sight is None else self._tree(sight, torch.tensor([*positions, *[positions[-1]] * (rows - n)]), slots)
        logits, last = self.steps.run(self.model, self.cache, ids, at, mask, 0, hidden=hidden)
        if rows > n:
            self.cache.seek(start + n)
        return logits[0, :n], None if last is None else last[0, :n]

    def keep(self, start: int, slots: Sequence[int]) -> None:
        """Of what lies at `start` and behind, these slots, in this order."""
        self.cache.compact(start, slots)

    def _tree(self, sight: Tensor, queries: Tensor, slots: Sequence[int]) -> Any:
        assert self._mask is not None
        n, m = sight.shape
        base = self.cache.length + n - m
        seen = torch.zeros(len(queries), self.cache.capacity, dtype=torch.bool)
        seen[:n, :base] = True
        seen[:n, base : base + m] = sight
        seen[n:, 0] = True  # rows that fill up a graph see something, so that nothing is undefined
        keys = torch.arange(self.cache.capacity)
        keys[base : base + m] = torch.tensor(slots)
        return self._mask(seen, queries, keys, self.device)
