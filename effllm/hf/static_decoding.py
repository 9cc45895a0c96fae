"""The loop for one prompt, or a few, as fast as it goes: static caches, and steps that are compiled once per batch and capacity.

One prompt lies in its slots from 0 on; where prompts are padded to buckets, padding lies behind it, and the causal mask hides it until
it is overwritten. Several prompts are padded on the left, so that all rows write the same slot; positions start at 0 for each,
and a mask (B, capacity) hides the padding. Rows that have ended are computed along until the last one ends.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from effllm.errors import PromptError
from effllm.hf.arena_cache import device_of
from effllm.hf.engine import refusal
from effllm.hf.request import Event, Request
from effllm.hf.slots import Slots, bucket
from effllm.hf.steps import Compiled, Steps, steps_of

CHUNK = 512  # prompts longer than that are read in several compiled forwards


class _Inputs:
    """Tokens and positions (B, 1) of a step. On the CPU they are the same tensors every time: a step has no time to make new ones."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.device = device
        with torch.inference_mode(False):
            self.tensors = tuple(torch.zeros(rows, 1, dtype=torch.int64) for _ in range(2))
        self.views = tuple(t.numpy() for t in self.tensors)

    def take(self, ids: list[int], positions: list[int]) -> tuple[Tensor, Tensor]:
        """The two tensors."""
        for view, values in zip(self.views, (ids, positions), strict=True):
            view[:, 0] = values
        first, second = self.tensors
        return (first, second) if self.device.type == "cpu" else (first.to(self.device), second.to(self.device))


class StaticLoop:
    """Runs a request on static caches."""

    def __init__(self, request: Request, compiled: Compiled) -> None:
        """Raises PromptError (E-PRM-MODEL, E-PRM-CAPACITY)."""
        self.request, self.compiled, self.model = request, compiled, request.inner
        refuse(self.model)
        self.device = device_of(self.model)
        work = request.sequences
        longest = max((len(s.prompt) for s in work), default=0)
        self.width = longest if len(work) == 1 or not compiled.prefill else padded(longest)
        self.capacity = room(self.width, max((s.most for s in work), default=0), request.limit, compiled)

    def events(self) -> Iterator[Event]:
        """Prefill, then a step for all rows until the last has ended."""
        work = self.request.sequences
        if not any(s.most for s in work):
            return
        steps = steps_of(self.model, self.compiled)
        with steps.borrow(self.model, len(work), self.capacity) as cache:
            logits = read(steps, self.model, cache, work[0].prompt.to(self.device)) if len(work) == 1 else self._rows(steps, cache)
            mask = None if len(work) == 1 else self._mask()
            running, inputs, greedy = list(range(len(work))), _Inputs(len(work), self.device), self.request.sampling.greedy
            tokens = self._choose(logits, running)
            while True:
                left = []
                for i, token in zip(running, tokens, strict=True):
                    event = self.request.take(i, token)
                    left += [] if event.done else [i]
                    yield event
                running = left
                if not running:
                    return
                # a row that has ended may be past its last position
                at = [min(cache.length - self.width + len(s.prompt), self.request.limit - 1) for s in work]
                given = inputs.take([s.new[-1] for s in work], at)
                found = steps.again(cache, *given) if mask is None else steps.again(cache, *given, mask)
                if found is None:
                    found = steps.run(self.model, cache, *given, mask, choose=greedy)[0]
                if greedy:  # the step itself has chosen
                    chosen = found.tolist()
                    tokens = [chosen[i][-1] for i in running]
                else:
                    tokens = self._choose(found[:, -1], running)

    def _choose(self, logits: Tensor, running: list[int]) -> list[int]:
        """The next token of each running row of logits (B, V)."""
        rows = [self.request.sequences[i] for i in running]
        of_running = logits if len(running) == len(self.request.sequences) else logits[running]
        return self.request.sampling.choose_all(of_running, lambda n: rows[n].whole(), [s.generator for s in rows])

    def _mask(self) -> Tensor:
        """(B, capacity): 0 for the padding left of each prompt."""
        start = torch.tensor([self.width - len(s.prompt) for s in self.request.sequences])
        return (torch.arange(self.capacity)[None] >= start[:, None]).long().to(self.device)

    def _rows(self, steps: Steps, cache: Slots) -> Tensor:
        """Logits (B, V) after all prompts, padded on the left to one width."""
        work = self.request.sequences
        ids = torch.stack([torch.cat([torch.zeros(self.width - len(s.prompt), dtype=torch.int64), s.prompt]) for s in work]).to(self.device)
        start = torch.tensor([self.width - len(s.prompt) for s in work], device=self.device)
        positions = (torch.arange(self.width, device=self.device)[None] - start[:, None]).clamp_min(0)
        mask, logits = self._mask(), ids.new_empty(0)
        size = self.width if not self.compiled.prefill else CHUNK
        for at in range(0, self.width, size):
            part = slice(at, min(at + size, self.width))
            logits = steps.run(self.model, cache, ids[:, part], positions[:, part], mask, eager=not self.compiled.prefill)[0]
        return logits[:, -1]


def refuse(model: object) -> None:
    """Raise PromptError (E-PRM-MODEL) where a model cannot go on static caches with positions of its own."""
    why = refusal(model)
    if why:
        raise PromptError("E-PRM-MODEL", why, "use the model's own generate")


def room(width: int, most: int, longest: int, compiled: Compiled | None, extra: int = 0) -> int:
    """The capacity for a prompt of `width` slots, `most` new tokens and `extra` drafted ones. Raises PromptError (E-PRM-CAPACITY)."""
    need = width + max(0, most - 1) + extra
    given = None if compiled is None else compiled.capacity
    if given is None:
        return bucket(max(1, need), longest)
    if given < need:
        raise PromptError("E-PRM-CAPACITY", f"{need} tokens for a cache of {given}", "give a larger capacity, or none")
    return given


def padded(tokens: int) -> int:
    """The bucket of a prompt: a power of two from 16 up to CHUNK, then whole chunks."""
    return -(-tokens // CHUNK) * CHUNK if tokens > CHUNK else max(16, 1 << (tokens - 1).bit_length())


def read(steps: Steps, model: object, cache: Slots, prompt: Tensor) -> Tensor:
    """Logits (1, V) after a prompt (S,): in one eager forward, or in compiled chunks with padding behind the last."""
    total, compiled = len(prompt), steps.compiled
    if compiled is None or not compiled.prefill:
        positions = torch.arange(total, device=prompt.device)[None]
        return steps.run(model, cache, prompt[None], positions, eager=True)[0][:, -1]
    logits = prompt.new_empty(0)
    for at in range(0, total, CHUNK):
        piece = prompt[at : at + CHUNK]
        size = min(padded(len(piece)), cache.capacity - at)
        positions = torch.arange(at, at + size, device=prompt.device).clamp_max(total - 1)  # padding must not reach past the model's positions
        ids = torch.nn.functional.pad(piece, (0, size - len(piece)))
        keep = torch.tensor([len(piece) - 1], device=prompt.device)
        logits = steps.run(model, cache, ids[None], positions[None], keep=keep)[0][:, -1]
        cache.seek(at + len(piece))
    return logits
