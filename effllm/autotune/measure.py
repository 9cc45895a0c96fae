"""Runs candidates: first against the exact result, then against the clock, in turns, with cold caches and a watch on the machine.

Verification uses random scales and poisons memory that a kernel should have written. Timing rotates copies of the weight past the
last-level cache, lets candidates take turns round by round, and reads a large buffer every few rounds: rounds between two reads that
took longer than usual are dropped, and where too many are, or other processes take the cores, the session is refused: a wrong time
in the store is worse than none.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from effllm.autotune import clocks, inputs, machine
from effllm.autotune.inputs import Expected, Operands
from effllm.errors import TuneError
from effllm.lowering.op import OPS, Config, Problem, Provider

EVERY = 4  # rounds between two reference reads
DRIFT = {"cpu": 0.2, "cuda": 0.03}  # by how much a read may exceed the usual one
SLACK = 0.4  # cores that others may take beyond those that are free
_SECONDS, _LEAST, _MOST = 0.12, 12, 200  # of timing per candidate; rounds
_SLOW, _SLOW_ROUNDS = 3.0, 4  # a candidate this much slower than the fastest takes few turns


@dataclass(frozen=True)
class Outcome:
    """What came of a candidate: a status of the store (ok, wrong, error, timeout, oom), and why."""

    status: str
    reason: str = ""


@dataclass(frozen=True)
class Timing:
    """Median and interquartile range of `n` samples, in seconds per call."""

    seconds: float
    spread: float
    n: int


@dataclass(frozen=True)
class Session:
    """Timings in the order of the candidates; empty with a reason where the machine was too busy. `dropped` of `windows` drifted.

    `failed` is set where a candidate ended the session, which one is not known.
    """

    timings: tuple[Timing, ...] = ()
    refused: str = ""
    windows: int = 0
    dropped: int = 0
    failed: Outcome | None = None


def failure(error: BaseException) -> Outcome:
    """The outcome of a candidate that raised."""
    text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".strip()
    memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error) or "OutOfResources" in text
    return Outcome("oom" if memory else "error", text)


def verify(
    provider: Provider, problem: Problem, config: Config | None, operands: Operands | None = None, expected: Sequence[Expected] | None = None
) -> Outcome:
    """Compare one call with the exact result: at most twice the error of plain torch, plus the op's floor.

    Raises TuneError where the problem itself cannot be run (see inputs.make); whatever the candidate raises is its outcome.
    """
    made = operands or inputs.make(problem, provider.layout, copies=1)
    wanted = made.expected() if expected is None else expected
    try:
        with poisoned():
            y = provider.call(*made.args[0], problem=problem, config=config)
        if torch.device(problem.device).type == "cuda":
            torch.cuda.synchronize(problem.device)
        y = y.detach().cpu()
    except Exception as error:  # noqa: BLE001 - a candidate may raise anything, and all of it is its result
        return failure(error)
    if y.dtype != problem.dtype or y.shape[-1] != problem.n or y.numel() != (problem.m or 1) * problem.n:
        return Outcome("wrong", f"the output is {y.dtype} of shape {tuple(y.shape)}")
    if not bool(y.isfinite().all()):
        return Outcome("wrong", "the output has elements that are not finite, or that were not written")
    floor = OPS[problem.op].tolerance.get(problem.dtype, 1e-6)
    for part in wanted:
        found, allowed = distance(part.pick(y), part.true), 2 * distance(part.plain, part.true) + floor
        if not found <= allowed:
            return Outcome("wrong", f"relative error {found:.3g}, {allowed:.3g} is allowed")
    return Outcome("ok")


def distance(y: torch.Tensor, true: torch.Tensor) -> float:
    """Relative Frobenius distance to an fp64 tensor."""
    return float((y.double() - true).norm() / true.norm().clamp_min(1e-30))


@contextmanager
def poisoned() -> Iterator[None]:
    """Within it torch fills new uninitialized tensors with NaN, so that an element that a kernel left out shows."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    flags: Any = torch.utils.deterministic
    filled = flags.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    flags.fill_uninitialized_memory = True
    try:
        yield
    finally:
        flags.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(before, warn_only=warn)


def time_configs(provider: Provider, problem: Problem, configs: Sequence[Config], operands: Operands, **limits: float | None) -> Session:
    """Time candidates that are known to be right on rotating copies of the weight."""

    def call_of(config: Config) -> Callable[[int], object]:
        return lambda i: provider.call(*operands.args[i % len(operands.args)], problem=problem, config=config)

    return time_interleaved([call_of(c) for c in configs], len(operands.args), device=problem.device, **limits)


def time_interleaved(
    calls: Sequence[Callable[[int], object]], copies: int, *, device: str = "cpu", seconds: float | None = None, slack: float | None = SLACK
) -> Session:
    """Time calls that take the number of a copy. `seconds` of timing per call (default 0.12); `slack` None takes what is measured whatever else runs.

    The first call of each is its warm-up and may raise whatever it raises.
    """
    load = machine.OtherLoad()
    clock: clocks.Clock = clocks.Cuda(calls, copies, device) if torch.device(device).type == "cuda" else clocks.Cpu(calls, copies)
    drift = math.inf if slack is None else DRIFT.get(torch.device(device).type, 0.1)
    session = interleave(clock, len(calls), seconds or _SECONDS, drift)
    others = load.cores() if slack is not None and torch.device(device).type == "cpu" else None
    free = (os.cpu_count() or 1) - torch.get_num_threads()
    if others is not None and slack is not None and others > free + slack:
        cause = f"other processes keep {others:.1f} cores busy, {max(0, free)} of {os.cpu_count()} are free beside {torch.get_num_threads()} threads"
        return Session((), cause, session.windows, session.dropped)
    return session


def interleave(clock: clocks.Clock, count: int, seconds: float, drift: float) -> Session:
    """Round-robin over the candidates 0 .. count - 1, with a reference read before, after and every few rounds."""
    first = [min(clock.sample(i) for _ in range(2)) for i in range(count)]
    quick = [f <= _SLOW * min(first) for f in first]
    turn = sum(f for f, q in zip(first, quick, strict=True) if q) * clock.calls
    rounds = max(_LEAST, min(_MOST, int(seconds * count / max(turn, 1e-9))))
    rounds = -(-rounds // EVERY) * EVERY
    reads = [clock.reference()]
    windows: list[list[list[float]]] = []
    for r in range(rounds):
        if r % EVERY == 0:
            windows.append([[] for _ in range(count)])
        for k in range(count):
            i = (k + r) % count  # no candidate always follows the same one
            if quick[i] or r < _SLOW_ROUNDS:
                windows[-1][i].append(clock.sample(i))
        if r % EVERY == EVERY - 1:
            reads.append(clock.reference())
    usual = statistics.quantiles(reads, n=4)[0]
    good = [w for w, a, b in zip(windows, reads, reads[1:], strict=False) if max(a, b) <= usual * (1 + drift)]
    dropped = len(windows) - len(good)
    if len(good) * 2 < len(windows):
        return Session((), f"memory reads drift: {dropped} of {len(windows)} windows took over {drift:.0%} more than usual", len(windows), dropped)
    timings = []
    for i in range(count):
        # a slow candidate has all its samples in the first window, whether that one was quiet or not
        samples = [s for w in good for s in w[i]] or [s for w in windows for s in w[i]]
        timings.append(_timing(samples))
    return Session(tuple(timings), "", len(windows), dropped)


def _timing(samples: list[float]) -> Timing:
    low, middle, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else samples * 3
    if not math.isfinite(middle) or middle <= 0:
        raise TuneError("E-TUN-CLOCK", f"a candidate took {middle} seconds", "report this with `effllm doctor --json`")
    return Timing(statistics.median(samples), high - low, len(samples))


class Local:
    """Verifies and times in this process. Keeps the operands of the newest problem."""

    def __init__(self, seconds: float | None = None, slack: float | None = SLACK) -> None:
        self._seconds, self._slack = seconds, slack
        self._kept: tuple[tuple[str, Problem], Operands, list[Expected]] | None = None

    def check(self, provider: Provider, problem: Problem, config: Config, timeout: float | None = None) -> Outcome:
        """See `verify`; a time-out needs a worker."""
        del timeout
        operands, expected = self._operands(provider, problem)
        return verify(provider, problem, config, operands, expected)

    def time(self, provider: Provider, problem: Problem, configs: Sequence[Config], timeout: float | None = None) -> Session:
        """See `time_configs`."""
        del timeout
        return time_configs(provider, problem, configs, self._operands(provider, problem)[0], seconds=self._seconds, slack=self._slack)

    def _operands(self, provider: Provider, problem: Problem) -> tuple[Operands, list[Expected]]:
        key = (provider.layout, problem)
        if self._kept is None or self._kept[0] != key:
            self._kept = None  # frees the old ones first
            made = inputs.make(problem, provider.layout)
            self._kept = (key, made, made.expected())
        return self._kept[1], self._kept[2]
