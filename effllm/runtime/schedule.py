"""Stall-free batching: which tokens the next forward computes, when prompts arrive while others decode (Sarathi-Serve, arXiv:2403.02310).

Every iteration takes one token of each sequence that decodes, then fills what is left of a token budget with chunks of prompts, those
already begun first, in order of arrival. A long prompt so takes many iterations and delays no running sequence by more than the budget
allows. Numbers only: no model, no clock, no tensors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from effllm.errors import OptionError


@dataclass(eq=False)
class Request:
    """A prompt of `prompt` tokens and at most `new` tokens to follow. `done` of the prompt are computed, `made` tokens exist."""

    id: int
    prompt: int
    new: int
    done: int = 0
    made: int = 0

    @property
    def decoding(self) -> bool:
        """Whether the whole prompt is computed."""
        return self.done >= self.prompt


@dataclass(frozen=True)
class Chunk:
    """Tokens start .. start + length of a request's prompt; `last`: its first new token follows."""

    id: int
    start: int
    length: int
    last: bool


@dataclass
class Step:
    """What one forward computes. `preempted` requests lost their keys and will be computed again from the start, new tokens included."""

    decodes: list[int] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    admitted: list[int] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens in the forward."""
        return len(self.decodes) + sum(c.length for c in self.chunks)


class Memory(Protocol):
    """Where keys and values go."""

    def fits(self, request: Request) -> bool:
        """Whether a request with all its tokens fits while nothing else is there."""
        ...

    def admit(self, request: Request) -> bool:
        """Make room to begin a request; False where there is none now."""
        ...

    def grow(self, request: Request) -> bool:
        """Make room for the token that the request decodes now; False where there is none."""
        ...

    def release(self, request: Request) -> None:
        """Free what a request holds."""
        ...


class Counted:
    """Memory of `slots` tokens anywhere. A request is admitted with room for its prompt and a first token, and grows a token at a time."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.held: dict[int, int] = {}

    def fits(self, request: Request) -> bool:
        """The last token is chosen and never computed."""
        return request.prompt + request.new - 1 <= self.slots

    def _fits(self, more: int) -> bool:
        return sum(self.held.values()) + more <= self.slots

    def admit(self, request: Request) -> bool:
        """Room for the prompt."""
        if not self._fits(request.prompt):
            return False
        self.held[request.id] = request.prompt
        return True

    def grow(self, request: Request) -> bool:
        """Room for one token more."""
        if not self._fits(1):
            return False
        self.held[request.id] += 1
        return True

    def release(self, request: Request) -> None:
        """Give all of it back."""
        del self.held[request.id]


class Scheduler:
    """First come, first served. `budget` tokens a forward; at most `most` sequences at a time.

    `chunk(done, prompt)` may cap a chunk further (see `declining`). Invariants, each tested: tokens of a step <= max(budget, decodes);
    every decoding sequence is in every step; no request waits for ever; every prompt token is computed once between preemptions.
    """

    def __init__(self, budget: int, most: int, memory: Memory, chunk: Callable[[int, int], int] | None = None) -> None:
        """Raises OptionError (E-OPT-BUDGET) for a budget that decoding alone could fill: prompts would wait behind it."""
        if most < 1 or budget < most:
            raise OptionError("E-OPT-BUDGET", f"{budget} tokens a step for up to {most} sequences", "give a budget of at least one token per sequence")
        self.budget, self.most, self.memory, self._chunk = budget, most, memory, chunk
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    @property
    def busy(self) -> bool:
        """Whether any request is left."""
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """A request arrives. OptionError: E-OPT-REQUEST for one without tokens or with an id in use, E-OPT-MEMORY where it can never fit."""
        if request.prompt < 1 or request.new < 1 or request.done or request.made:
            raise OptionError("E-OPT-REQUEST", f"request {request.id}: {request.prompt} prompt tokens, {request.new} new ones", "give at least one of each")
        if any(r.id == request.id for r in (*self.waiting, *self.running)):
            raise OptionError("E-OPT-REQUEST", f"request {request.id} is there already", "number the requests")
        if not self.memory.fits(request):
            cause = f"request {request.id} needs {request.prompt} + {request.new} tokens, more than the whole memory"
            raise OptionError("E-OPT-MEMORY", cause, "give more slots, a shorter prompt, or ask for fewer tokens")
        self.waiting.append(request)

    def step(self) -> Step:
        """The next forward, which the caller must run, or `undo`: progress is counted here. Empty where nothing is left to do."""
        step = Step()
        for request in [r for r in self.running if r.decoding]:
            if request in self.running and self._room(request, step):
                request.made += 1
                step.decodes.append(request.id)
        for request in self.running:
            if not request.decoding:
                self._take(request, step)
        while self.waiting and len(self.running) < self.most and step.tokens < self.budget and not step.preempted:
            request = self.waiting[0]
            if not self.memory.admit(request):
                break  # in order: a small one behind a large one waits
            self.running.append(self.waiting.popleft())
            step.admitted.append(request.id)
            self._take(request, step)
        return step

    def undo(self, step: Step) -> None:
        """The step's forward failed: its tokens are to be computed again. Who was admitted or preempted stays so."""
        found = {r.id: r for r in self.running}
        for id in step.decodes:
            found[id].made -= 1
        for chunk in step.chunks:
            found[chunk.id].done -= chunk.length
            found[chunk.id].made -= chunk.last

    def finish(self, id: int) -> None:
        """A request has its last token (or was cancelled, wherever it is). KeyError where there is none of that id."""
        for queue in (self.running, self.waiting):
            for request in queue:
                if request.id == id:
                    if queue is self.running:
                        self.memory.release(request)
                    queue.remove(request)
                    return
        raise KeyError(id)

    def _take(self, request: Request, step: Step) -> None:
        length = min(request.prompt - request.done, max(0, self.budget - step.tokens))
        if self._chunk is not None:
            length = min(length, max(1, self._chunk(request.done, request.prompt)))
        if length > 0:
            step.chunks.append(Chunk(request.id, request.done, length, request.done + length == request.prompt))
            request.done += length
            request.made += request.decoding

    def _room(self, request: Request, step: Step) -> bool:
        """Room for a decoding request's next token, at the cost of the latest ones; False where that was itself."""
        while not self.memory.grow(request):
            victim = self.running.pop()
            self.memory.release(victim)
            # what it has made becomes prompt: computed again, not chosen again
            victim.prompt, victim.done = victim.prompt + victim.made, 0
            victim.new, victim.made = victim.new - victim.made, 0
            self.waiting.appendleft(victim)
            step.preempted.append(victim.id)
            if victim is request:
                return False
        return True


def declining(high: int, low: int, stages: int, tile: int = 32) -> Callable[[int, int], int]:
    """Chunks that shrink from `high` to `low` tokens in `stages` steps as a prompt progresses, since later chunks see more keys.

    Multiples of `tile` where they are as large. OptionError (E-OPT-BUDGET) unless high >= low >= 1 and stages >= 2.
    """
    if not high >= low >= 1 or stages < 2:
        raise OptionError("E-OPT-BUDGET", f"chunks from {high} to {low} in {stages} stages", "give high >= low >= 1 and two stages or more")

    def chunk(done: int, prompt: int) -> int:
        stage = min(stages - 1, done * stages // prompt)
        size = high - (high - low) * stage // (stages - 1)
        return size // tile * tile if size >= tile else size

    return chunk
