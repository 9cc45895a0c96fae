"""The loop for many prompts of any lengths: packed prefill, one extent of the arena per sequence, one forward per step for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from effllm.hf.cache import CompressedCache
from effllm.hf.engine import Engine, Piece
from effllm.hf.request import Event, Pending, Request
from effllm.runtime.prepack import prepack

BIN = 1024  # tokens of a prefill forward unless a prompt is longer: matrix products gain nothing beyond


class ArenaLoop:
    """Runs a request on an engine; with `cache`, sequences get caches of their own once their prompts are read."""

    def __init__(self, request: Request, capacity: int | None, cache: str | Callable[[], Any] | None) -> None:
        self.request, self.sequences = request, request.sequences
        ids = [s.prompt for s in self.sequences]
        self.packing = prepack(ids, max([BIN, *map(len, ids)]) if capacity is None else capacity)
        self.cache = _maker(request.inner, cache)
        if cache is None:
            slots = sum(len(s.prompt) + max(0, s.most - 1) for s in self.sequences)
        else:  # the arena holds one bin at a time
            slots = max((sum(len(ids[i]) for i in b) for b in self.packing.bins), default=0)
        self.engine = Engine(request.model, max(1, slots))

    def events(self) -> Iterator[Event]:
        """Prefill by bins, then step by step; a bin's first tokens are streamed before the next bin is read."""
        running: list[int] = []
        if not any(s.most for s in self.sequences):
            return
        for members in self.packing.bins:
            for i in members:
                s = self.sequences[i]
                s.row = self.engine.open(len(s.prompt) + (max(0, s.most - 1) if self.cache is None else 0))
            yield from self._step([(i, self.sequences[i].prompt) for i in members], running)
        while running:
            step, running = [(i, torch.tensor(self.sequences[i].new[-1:])) for i in sorted(running)], []
            yield from self._step(step, running)

    def _step(self, work: list[tuple[int, Tensor]], running: list[int]) -> Iterator[Event]:
        logits = self._forward(work)
        found = [self.sequences[i] for i, _ in work]
        tokens = self.request.sampling.choose_all(logits, lambda n: found[n].whole(), [s.generator for s in found])
        for (i, _), token in zip(work, tokens, strict=True):
            event = self.request.take(i, token)
            if not event.done:
                running.append(i)
            yield event

    def _forward(self, work: list[tuple[int, Tensor]]) -> Tensor:
        """Logits (len(work), V): one forward for rows of the arena, one each for sequences with caches of their own."""
        own = [self.sequences[i] for i, _ in work]
        if own[0].cache is not None:
            return torch.cat([self._alone(s, ids) for s, (_, ids) in zip(own, work, strict=True)])
        rows = [s.row for s in own if s.row is not None]
        logits = self.engine.run([Piece(row, ids) for row, (_, ids) in zip(rows, work, strict=True)])
        if self.cache is not None:
            for s, row in zip(own, rows, strict=True):
                s.cache, s.row = self.engine.export(row, self.cache()), None
                self.engine.close(row)
        return logits

    @torch.no_grad()
    def _alone(self, s: Pending, ids: Tensor) -> Tensor:
        at = torch.tensor([[len(s.prompt) + len(s.new) - 1]], device=self.engine.device)
        out = self.request.model(input_ids=ids[None].to(self.engine.device), position_ids=at, past_key_values=s.cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = out.logits[:, -1]
        return logits


def _maker(model: Any, cache: str | Callable[[], Any] | None) -> Callable[[], Any] | None:
    """What makes a sequence's cache. A format is tried once, so that a wrong one raises CacheError before the first forward."""
    if not isinstance(cache, str):
        return cache
    CompressedCache(model, cache)
    return lambda: CompressedCache(model, cache)
