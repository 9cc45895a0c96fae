"""Timing in turns: bursts of calls on cold copies, one candidate after another, round after round.

A burst is one call that is not timed, then as many as fill about two milliseconds. On the CPU a pause comes before it: several
runtimes with OpenMP pools of their own share the cores, and the threads of the one before spin for a while after their work.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from effllm.autotune.bench.candidate import Candidate

BURST = 2e-3  # seconds
PAUSE = 1e-3  # seconds
LEAST = 5  # rounds, however long they take
LONG = 10 * BURST  # a call that takes this long needs no call before it that is not timed


@dataclass(frozen=True)
class Times:
    """Seconds per kernel call: one figure per burst."""

    samples: tuple[float, ...]
    how: str  # "clock", or on a GPU "graph" or "events"

    @property
    def median(self) -> float:
        """The middle of the samples."""
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The middle half of the samples."""
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high


def interleaved(candidates: Sequence[Candidate], seconds: float, most: int = 40, device: str = "cpu") -> list[Times]:
    """Times of candidates that take turns for about `seconds`, at least `LEAST` and at most `most` rounds."""
    if not candidates:
        return []
    bursts = [_gpu_burst(c) if device == "cuda" else _cpu_burst(c) for c in candidates]
    start = time.perf_counter()
    samples = [[burst()] for burst, _ in bursts]
    rounds = max(LEAST, min(most, int(seconds / (time.perf_counter() - start))))
    for _ in range(rounds - 1):
        for kept, (burst, _) in zip(samples, bursts, strict=True):
            kept.append(burst())
    return [Times(tuple(kept), how) for kept, (_, how) in zip(samples, bursts, strict=True)]


Burst = tuple[Callable[[], float], str]


def _cpu_burst(candidate: Candidate) -> Burst:
    candidate.run()
    start = time.perf_counter()
    candidate.run()
    took = time.perf_counter() - start
    count = runs(took)

    def burst() -> float:
        time.sleep(PAUSE)
        if took < LONG:
            candidate.run()
        start = time.perf_counter()
        for _ in range(count):
            candidate.run()
        return (time.perf_counter() - start) / (count * candidate.calls)

    return burst, "clock"


def runs(seconds: float) -> int:
    """How many runs of `seconds` fill a burst."""
    return max(1, round(BURST / max(seconds, 1e-7)))


def _gpu_burst(candidate: Candidate) -> Burst:
    """A replay of a CUDA graph of one pass over the copies; events around eager calls where the kernel cannot be captured."""
    count = -(-max(20, candidate.copies) // candidate.calls)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            candidate.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(count):
                candidate.run()
        work, how = graph.replay, "graph"
    except RuntimeError:  # a kernel that allocates or waits: the row says "events"
        torch.cuda.synchronize()

        def work() -> None:
            for _ in range(count):
                candidate.run()

        how = "events"

    def burst() -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3 / (count * candidate.calls)

    return burst, how
