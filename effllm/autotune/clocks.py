"""Clocks that time candidates on a device: seconds per call on the next copies of the weight, and the time of a reference read."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

_SAMPLE = 2e-4  # s of a sample at least: timer and loop are then below a percent
_LAUNCHES = 20  # calls in a CUDA graph
_READ = 64 << 20  # bytes of the reference read on CPU


class Clock(Protocol):
    """Times candidates by their number. `calls` is how many calls a sample makes, about."""

    calls: float

    def sample(self, i: int) -> float:
        """Seconds per call of candidate i."""
        ...

    def reference(self) -> float:
        """Seconds of a read that does not depend on any candidate."""
        ...


@functools.lru_cache(maxsize=2)
def _buffer(device: str, nbytes: int) -> Tensor:
    return torch.ones(nbytes // 4, dtype=torch.float32, device=device)


class Cpu:
    """`perf_counter_ns` around a few calls in a row, each on the next copy."""

    def __init__(self, calls: Sequence[Callable[[int], object]], copies: int) -> None:
        self._calls, self._copies, self._next = calls, copies, 0
        self._repeat = [1] * len(calls)
        self.calls = 1.0
        for i, call in enumerate(calls):
            call(0)  # warm-up: compiles, allocates, wakes threads
            estimate = min(self.sample(i) for _ in range(2))
            # one sample does not come back to a copy that it has read
            self._repeat[i] = max(1, min(copies, math.ceil(_SAMPLE / max(estimate, 1e-9))))
        self.calls = sum(self._repeat) / max(1, len(calls))

    def sample(self, i: int) -> float:
        """Seconds per call."""
        call, repeat = self._calls[i], self._repeat[i]
        first, self._next = self._next, (self._next + repeat) % self._copies
        start = time.perf_counter_ns()
        for j in range(first, first + repeat):
            call(j)
        return (time.perf_counter_ns() - start) / repeat * 1e-9

    def reference(self) -> float:
        """Seconds to sum a buffer of 64 MiB, which also empties the caches."""
        buffer = _buffer("cpu", _READ)
        start = time.perf_counter_ns()
        buffer.sum()
        return (time.perf_counter_ns() - start) * 1e-9


class Cuda:
    """A CUDA graph of 20 launches per candidate, timed by events; where a call cannot be captured, the launches themselves."""

    calls = float(_LAUNCHES)

    def __init__(self, calls: Sequence[Callable[[int], object]], copies: int, device: str) -> None:
        self._device, self._calls, self._copies = torch.device(device), calls, copies
        from effllm.autotune.inputs import cache_bytes

        self._buffer = _buffer(device, max(_READ, 4 * cache_bytes(device)))
        self._next = 0
        with torch.cuda.device(self._device):
            self._graphs = [self._capture(call) for call in calls]

    def _capture(self, call: Callable[[int], object]) -> torch.cuda.CUDAGraph | None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for i in range(3):  # compiles outside of the capture
                call(i)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        first, self._next = self._next, (self._next + _LAUNCHES) % self._copies
        try:
            with torch.cuda.graph(graph):
                for i in range(first, first + _LAUNCHES):
                    call(i)
        except RuntimeError:  # something in the call waits for the device
            torch.cuda.synchronize()
            return None
        graph.replay()
        torch.cuda.synchronize()
        return graph

    def _timed(self, run: Callable[[], object]) -> float:
        with torch.cuda.device(self._device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e-3

    def sample(self, i: int) -> float:
        """Seconds per launch. A graph reads 20 copies in a row; where there are fewer, the read in between empties the cache."""
        if self._copies < 2 * _LAUNCHES:
            self._buffer.sum()
        graph = self._graphs[i]
        if graph is not None:
            return self._timed(graph.replay) / _LAUNCHES

        def launches() -> None:
            for j in range(_LAUNCHES):
                self._calls[i](j)

        return self._timed(launches) / _LAUNCHES

    def reference(self) -> float:
        """Seconds to sum the buffer."""
        return self._timed(self._buffer.sum)
