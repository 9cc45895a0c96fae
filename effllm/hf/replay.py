"""A trace of requests through the serving loop in real time: time to first token, time between tokens, and what the forwards held.

Time between tokens is what a reader of a running sequence sees; its high percentiles are where prompts of others stall it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from effllm.hf.engine import Engine, Piece
from effllm.hf.serving import Loop
from effllm.runtime.trace import Arrival

PERCENTILES = (50, 90, 99)


@dataclass
class Log:
    """When everything happened, in seconds. `steps`: (seconds, sequences that decoded, prompt tokens) of each forward."""

    arrivals: dict[int, float] = field(default_factory=dict)
    tokens: dict[int, list[float]] = field(default_factory=dict)
    steps: list[tuple[float, int, int]] = field(default_factory=list)

    def between(self) -> list[float]:
        """Seconds between consecutive tokens of a sequence, of all sequences."""
        return [b - a for times in self.tokens.values() for a, b in pairwise(times)]

    def first(self) -> list[float]:
        """Seconds from arrival to the first token, of all sequences."""
        return [times[0] - self.arrivals[i] for i, times in self.tokens.items() if times]


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """p50, p90, p99 (nearest rank) and the largest value; None of nothing."""
    ordered = sorted(values)
    at = {f"p{p}": ordered[max(0, -(-len(ordered) * p // 100) - 1)] if ordered else None for p in PERCENTILES}
    return at | {"max": ordered[-1] if ordered else None}


def replay(
    loop: Loop, trace: Sequence[Arrival], prompts: Callable[[int], Tensor], clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[float], None] = lambda share: None,
) -> Log:  # fmt: skip
    """Run every request of a trace; `prompts(n)` gives the ids of a prompt of n tokens. Waits for an arrival are skipped, not slept."""
    log, at, skipped = Log(), 0, 0.0
    start = clock()

    def now() -> float:
        return clock() - start + skipped

    while at < len(trace) or loop.busy:
        if not loop.busy:
            skipped += max(0.0, trace[at].arrival - now())
        while at < len(trace) and trace[at].arrival <= now():
            id = loop.submit(prompts(trace[at].prompt), trace[at].new)
            log.arrivals[id], log.tokens[id] = trace[at].arrival, []
            at += 1
        before = now()
        events = loop.step()
        done = now()
        log.steps.append((done - before, loop.last.decodes, loop.last.prompt_tokens))
        for event in events:
            log.tokens[event.index].append(done)
        progress(sum(len(t) for t in log.tokens.values()) / sum(a.new for a in trace))
    return log


def summary(log: Log) -> dict[str, Any]:
    """Figures of a log, seconds and tokens a second; JSON-ready."""
    new = sum(len(t) for t in log.tokens.values())
    read = sum(p for *_, p in log.steps)
    ends = [t[-1] for t in log.tokens.values() if t]
    span = max(ends) - min(log.arrivals.values()) if ends else 0.0
    plain = [s for s, decodes, prompt in log.steps if decodes and not prompt]
    mixed = [s for s, decodes, prompt in log.steps if decodes and prompt]
    return {
        "requests": len(log.tokens), "new_tokens": new, "prompt_tokens": read, "seconds": span, "new_tok_s": new / span if span else None,
        "time_to_first_token_s": percentiles(log.first()), "time_between_tokens_s": percentiles(log.between()),
        "steps": len(log.steps), "decode_step_s": percentiles(plain), "mixed_step_s": percentiles(mixed),
        "largest_prompt_part": max((p for *_, p in log.steps), default=0),
    }  # fmt: skip


def choose_budget(
    model: Any, decodes: int, context: int, prompt: int, ratio: float, rounds: int = 5, tile: int = 4, clock: Callable[[], float] = time.perf_counter
) -> int:
    """The largest budget at which a step of `decodes` sequences of `context` tokens takes at most `ratio` times one without a prompt's chunk.

    Measured here, at the end of a prompt of `prompt` tokens, where a chunk is dearest; chunks are multiples of `tile`. At least
    decodes + tile, since a prompt must move on.
    """
    engine = Engine(model, decodes * (context + 1) + prompt)
    rows = [engine.open(context + 1) for _ in range(decodes)]
    long = engine.open(prompt)
    assert long is not None
    token = torch.zeros(1, dtype=torch.int64)

    def seconds(chunk: int) -> float:
        times = []
        for _ in range(rounds + 1):  # the first is warm-up
            pieces = []
            for row in rows:
                assert row is not None
                row.length = context
                pieces.append(Piece(row, token))
            if chunk:
                long.length = prompt - chunk
                pieces.append(Piece(long, token.expand(chunk)))
            begin = clock()
            engine.run(pieces)
            times.append(clock() - begin)
        return statistics.median(times[1:])

    plain, chunk = seconds(0), tile
    while 2 * chunk <= prompt and seconds(2 * chunk) <= ratio * plain:
        chunk *= 2
    low, high = chunk, 2 * chunk  # the answer lies in [low, high)
    while high - low > tile:
        middle = (low + high) // 2 // tile * tile
        if middle <= prompt and seconds(middle) <= ratio * plain:
            low = middle
        else:
            high = middle
    return decodes + low
