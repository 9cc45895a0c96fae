"""A decode loop that takes requests while others run: each `step` is one forward over running sequences and chunks of new prompts.

    loop = Loop(model, budget=256, most=16, slots=16384)
    id = loop.submit(prompt_ids, new=64)
    while loop.busy:
        for event in loop.step(): ...

What runs when is decided by runtime/schedule.py. Keys and values are exact while a prompt is read, chunk after chunk, whatever the chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from effllm.errors import PromptError
from effllm.hf.engine import Engine, Piece, Row
from effllm.hf.request import Event, eos_of
from effllm.hf.sampling import Sampling
from effllm.runtime.prepack import checked
from effllm.runtime.schedule import Request, Scheduler


class ArenaMemory:
    """The scheduler's memory over an engine's slots.

    `ahead` None holds room for all tokens of a request from the start, so that nothing is ever computed twice. A number holds room for
    that many new tokens and grows by as many: more sequences at a time where answers end early, and now and then a preemption.
    """

    def __init__(self, engine: Engine, ahead: int | None = None) -> None:
        self.engine, self.ahead = engine, ahead
        self.rows: dict[int, Row] = {}

    def _room(self, request: Request, now: int) -> int:
        whole = request.prompt + request.new - 1
        return whole if self.ahead is None else min(whole, now + self.ahead)

    def fits(self, request: Request) -> bool:
        """Whether it fits alone."""
        return request.prompt + request.new - 1 <= self.engine.cache.slots

    def admit(self, request: Request) -> bool:
        """An extent for the prompt and what is to follow."""
        row = self.engine.open(self._room(request, request.prompt))
        if row is not None:
            self.rows[request.id] = row
        return row is not None

    def grow(self, request: Request) -> bool:
        """Room for one more token."""
        row = self.rows[request.id]
        return row.length < row.capacity or self.engine.grow(row, self._room(request, row.length + 1))

    def release(self, request: Request) -> None:
        """Close the extent."""
        self.engine.close(self.rows.pop(request.id))


@dataclass
class _Ticket:
    """A request's tokens: `ids` to compute in chunks (the prompt; after a preemption also what had been made), `new` all that were made."""

    ids: Tensor
    prompt: int
    most: int
    generator: torch.Generator | None
    new: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Forward:
    """What the last step computed: sequences that decoded, and tokens of prompts."""

    decodes: int = 0
    prompt_tokens: int = 0


class Loop:
    """Requests in, tokens out. Not for several threads at once; the model may be in use elsewhere."""

    def __init__(
        self, model: Any, *, budget: int, most: int, slots: int, ahead: int | None = None, sampling: Sampling | None = None,
        eos_token_id: int | Sequence[int] | None = None, chunk: Callable[[int, int], int] | None = None, pad_to: Callable[[int], int] | None = None,
    ) -> None:  # fmt: skip
        """`budget` tokens a forward, `most` sequences at a time, `slots` tokens of keys and values. Raises OptionError and PromptError."""
        self.engine = Engine(model, slots, pad_to)
        self.memory = ArenaMemory(self.engine, ahead)
        self.scheduler = Scheduler(budget, most, self.memory, chunk)
        self.sampling = sampling or Sampling()
        self.eos = eos_of(self.engine.inner, eos_token_id)
        self.last = Forward()
        self._tickets: dict[int, _Ticket] = {}
        self._next = 0

    @property
    def busy(self) -> bool:
        """Whether any request is left."""
        return self.scheduler.busy

    def submit(self, prompt: Tensor | Sequence[int], new: int, seed: int = 0) -> int:
        """A request for at most `new` tokens; its id. Raises PromptError and OptionError (E-OPT-REQUEST, E-OPT-MEMORY), and is then not there."""
        ids = checked(prompt, self._next, self.engine.vocabulary)
        if len(ids) + new - 1 > self.engine.limit:
            cause = f"{len(ids)} tokens and {new} more, where the model's positions end at {self.engine.limit}"
            raise PromptError("E-PRM-CAPACITY", cause, "give a shorter prompt, or ask for fewer tokens")
        id = self._next
        self.scheduler.add(Request(id, len(ids), new))
        self._next += 1
        self._tickets[id] = _Ticket(ids, len(ids), new, torch.Generator().manual_seed(seed) if self.sampling.temperature else None)
        return id

    def cancel(self, id: int) -> list[int]:
        """Stop a request wherever it is; the tokens it has made. KeyError where there is none."""
        self.scheduler.finish(id)
        return self._tickets.pop(id).new

    def step(self) -> list[Event]:
        """One forward; the tokens it made. A forward that raises leaves everything as it was before."""
        step = self.scheduler.step()
        for id in step.preempted:
            ticket = self._tickets[id]
            ticket.ids = self._whole(ticket)
        rows = self.memory.rows
        pieces = [Piece(rows[i], torch.tensor(self._tickets[i].new[-1:])) for i in step.decodes]
        pieces += [Piece(rows[c.id], self._tickets[c.id].ids[c.start : c.start + c.length], c.last) for c in step.chunks]
        self.last = Forward(len(step.decodes), sum(c.length for c in step.chunks))
        if not pieces:
            return []
        try:
            logits = self.engine.run(pieces)
        except BaseException:
            self.scheduler.undo(step)
            raise
        ids = [*step.decodes, *(c.id for c in step.chunks if c.last)]
        found = [self._tickets[i] for i in ids]
        tokens = self.sampling.choose_all(logits, lambda n: self._whole(found[n]), [t.generator for t in found])
        return [self._take(i, token) for i, token in zip(ids, tokens, strict=True)]

    def _whole(self, ticket: _Ticket) -> Tensor:
        """Prompt and all new tokens."""
        return torch.cat([ticket.ids[: ticket.prompt], torch.tensor(ticket.new, dtype=torch.int64)])

    def _take(self, id: int, token: int) -> Event:
        ticket = self._tickets[id]
        ticket.new.append(token)
        done: Literal["", "eos", "length"] = "eos" if token in self.eos else "length" if len(ticket.new) >= ticket.most else ""
        if done:
            self.cancel(id)
        return Event(id, token, "", done)
