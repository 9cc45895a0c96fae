"""Finds the configuration of a problem: ranked by the cost model, a few verified and timed, then those that the results so far make most
promising (learned.py), and coordinate descent at the end.

Every result goes to the store at once, failures too, and nothing that the store has is tried again: a search that was cut short goes
on where it stopped, and one that was finished measures nothing. What runs candidates is a Runner: a worker process, this process, or
a simulated device. `exhaustive` and `random_search` walk the same space with the same runner, as controls.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from effllm.autotune import fingerprint, journal, space, tables
from effllm.autotune.key import Key
from effllm.autotune.learned import Learned
from effllm.autotune.measure import Outcome, Session
from effllm.autotune.measurement import Measurement
from effllm.autotune.space import Space
from effllm.autotune.store import Store
from effllm.errors import TuneError
from effllm.lowering.op import Config, Problem, Provider, Verdict

TOP, DIVERSE = 4, 2  # first candidates: the best ranked, and of other kinds
_IDLE = 2  # rounds without gain before the descent
_ROUND = 4  # trials between two looks at what was learned
NEAR_BOUND = 0.92  # share of the bound at which a search stops
LEAST_GAIN = 0.01  # of a round, measured or expected
RANKED = 0.7  # Spearman below which the cost model is not trusted
_BATCH = 8  # candidates that are timed together
_TIMEOUT = 60.0  # s for one candidate


class Runner(Protocol):
    """Runs candidates: measure.Local, worker.Worker, or a simulation."""

    def check(self, provider: Provider, problem: Problem, config: Config, timeout: float | None = None) -> Outcome:
        """Verify one candidate."""
        ...

    def time(self, provider: Provider, problem: Problem, configs: Sequence[Config], timeout: float | None = None) -> Session:
        """Time verified candidates in turns."""
        ...


@dataclass(frozen=True)
class Trial:
    """A configuration that was tried, in this run or (`known`) before. `seconds` is None unless the status is ok."""

    config: Config
    status: str
    seconds: float | None
    predicted: float
    known: bool = False
    reason: str = ""


@dataclass
class Result:
    """What a search found. `first` is the cost model's choice, `bound` the time that no configuration can beat, in seconds.

    `trials` are in the order in which they were tried; `measured` counts those of this run. `stopped` says why the search ended.
    """

    problem: Problem
    provider: str
    bound: float
    trials: list[Trial] = field(default_factory=list)
    first: Trial | None = None
    spearman: float | None = None
    stopped: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def best(self) -> Trial | None:
        """The fastest of the right ones."""
        return min((t for t in self.trials if t.seconds is not None), key=lambda t: t.seconds or 0.0, default=None)

    @property
    def measured(self) -> int:
        """Trials of this run."""
        return sum(not t.known for t in self.trials)

    def reached(self, seconds: float) -> int | None:
        """After how many trials a time at most this good was found; None where never."""
        return next((i for i, t in enumerate(self.trials, start=1) if t.seconds is not None and t.seconds <= seconds), None)


class Search:
    """One search on one problem; see `tune`. Raises TuneError where the problem cannot be tuned or the store not be written."""

    def __init__(
        self, provider: Provider, problem: Problem, store: Store, budget_s: float, runner: Runner, *,
        key: Key | None = None, environment: fingerprint.Environment | None = None, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        if not budget_s > 0:
            raise TuneError("E-TUN-BUDGET", f"a budget of {budget_s:g} s", "give a positive number of seconds")
        if provider.tuning is None:
            raise TuneError("E-TUN-PROVIDER", f"{provider.name} has one configuration for {problem.op}", "there is nothing to tune")
        if problem.m is None or min(problem.m, problem.n, problem.k) < 1:
            raise TuneError("E-TUN-SHAPE", f"{problem.op}: m={problem.m}, n={problem.n}, k={problem.k}", "give positive whole numbers")
        self.provider, self.problem, self.store, self.runner, self.clock = provider, problem, store, runner, clock
        self.key = key or Key.of(problem, provider.name)
        self.environment = environment or fingerprint.environment(self.key.device)
        self.deadline = clock() + budget_s
        self.tuning = provider.tuning
        self.space = Space(self.tuning.configs(problem), lambda c: self.tuning.predict(problem, c).seconds)
        if not self.space.ranked:
            raise TuneError("E-TUN-SHAPE", f"{provider.name} has no configuration for {problem}", "see `effllm doctor` for what the kernel takes")
        self.learned = Learned(self.space.ranked, [self.space.predicted(c) for c in self.space.ranked])
        bound = min(self.tuning.predict(problem, c).bound for c in self.space.ranked)
        self.result = Result(problem, provider.name, bound)
        self.tried: dict[str, Trial] = {}
        self.known = store.results(self.key, self.environment)
        gone = [text for text in self.known if text not in self.space]
        if gone:
            self.result.notes.append(f"{len(gone)} stored configurations are no longer legal, first {gone[0]}")

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.deadline - self.clock()

    def writable(self) -> None:
        """Raise TuneError (E-TUN-WRITE) before anything is measured that could not be kept."""
        with journal.writing(self.store.path(self.environment, self.key.op)):
            pass

    def take(self, configs: Sequence[Config]) -> bool:
        """Try configurations that were not tried yet; False where the budget ended or the machine was too busy before all were."""
        waiting: list[Config] = []
        for config in configs:
            text = space.text_of(config)
            if text in self.tried or any(space.text_of(w) == text for w in waiting):
                continue
            entry = self.known.get(text)
            if entry is not None:
                self._add(Trial(config, entry.status, entry.seconds, self.space.predicted(config), known=True))
            else:
                waiting.append(config)
        while waiting:
            if self.left() <= 0:
                self.result.stopped = "budget"
                return False
            batch, waiting = waiting[:_BATCH], waiting[_BATCH:]
            if not self._measure(batch):
                return False
        return True

    def _measure(self, configs: Sequence[Config]) -> bool:
        self.writable()
        right = []
        for config in configs:
            if self.left() <= 0:
                self.result.stopped = "budget"
                break
            # compiling must not be cut short by what little is left: the result is kept for the next run
            outcome = self.runner.check(self.provider, self.problem, config, timeout=_TIMEOUT)
            if outcome.status == "ok":
                right.append(config)
            else:
                self._keep(config, outcome)
        return self._time(right) and self.result.stopped != "budget"

    def _time(self, configs: Sequence[Config]) -> bool:
        """Time verified configurations together; False where the machine is too busy."""
        if not configs:
            return True
        session = self.runner.time(self.provider, self.problem, configs)
        if session.refused:  # a burst of other work may be over
            session = self.runner.time(self.provider, self.problem, configs)
        if session.refused:
            self.result.stopped = f"not measured: {session.refused}"
            self.result.notes.append(session.refused)
            return False
        if session.failed is None:
            for config, timing in zip(configs, session.timings, strict=True):
                self._keep(config, Outcome("ok"), timing.seconds, timing.spread, timing.n)
        elif len(configs) == 1:
            self._keep(configs[0], session.failed)
        else:  # it came through its check and failed later: each by itself tells which one
            return all(self._time([config]) for config in configs)
        return True

    def _keep(self, config: Config, outcome: Outcome, seconds: float | None = None, spread: float | None = None, n: int = 0) -> None:
        predicted = self.space.predicted(config)
        # to disk first: a kill now loses nothing
        self.store.append(Measurement(self.key, dict(config), outcome.status, self.environment, seconds, spread, n, predicted))
        self._add(Trial(config, outcome.status, seconds, predicted, reason=outcome.reason))
        if outcome.status != "ok":
            self.result.notes.append(f"{dict(config)}: {outcome.status}, {outcome.reason}")

    def _add(self, trial: Trial) -> None:
        self.tried[space.text_of(trial.config)] = trial
        self.result.trials.append(trial)

    def seeds(self) -> list[Config]:
        """The fastest for this very problem with other software, and the one that was shipped, where they are still legal.

        Not what this search has measured itself: a search that goes on takes the same way again.
        """
        store = tables.shipped(tables.FOLDER)
        found = [self.store.stale(self.key, self.environment)]
        answer = store.find(self.key, lambda c: Verdict(space.text_of(c) in self.space), self.environment) if store is not None else None
        found += [answer.entry] if answer is not None and answer.how in tables.OWN else []
        return [dict(m.config) for m in found if m is not None and m.config_text in self.space]

    def promising(self) -> tuple[list[Config], float]:
        """The next round by what was learned, and the expected gain of its first as a share of the best time."""
        done = {place: t for t in self.result.trials if (place := self.space.place(t.config)) is not None}
        found = self.learned.next({p: t.seconds for p, t in done.items() if t.seconds is not None}, set(done), _ROUND)
        return [self.space.ranked[i] for i, _ in found], found[0][1] if found else 0.0

    def descent(self, best: Config) -> list[Config]:
        """A round of coordinate descent: untried neighbours of `best`, the most promising ones first."""
        done = {p: t.seconds for t in self.result.trials if t.seconds is not None and (p := self.space.place(t.config)) is not None}
        expected = self.learned.expected(done)
        fresh = [c for c in self.space.neighbours(best) if space.text_of(c) not in self.tried]
        return sorted(fresh, key=lambda c: expected[self.space.place(c) or 0])[:_ROUND]

    def ranking(self) -> float | None:
        """Spearman correlation of predicted and measured times; None for fewer than four."""
        pairs = [(t.predicted, t.seconds) for t in self.result.trials if t.seconds is not None]
        return space.spearman(pairs) if len(pairs) >= 4 else None

    def finish(self, stopped: str) -> Result:
        """Close the result."""
        result = self.result
        result.stopped = result.stopped or stopped
        result.first = self.tried.get(space.text_of(self.tuning.first(self.problem)))
        result.spearman = self.ranking()
        return result


def tune(
    provider: Provider, problem: Problem, store: Store, budget_s: float, runner: Runner, *, top: int = TOP, diverse: int = DIVERSE,
    key: Key | None = None, environment: fingerprint.Environment | None = None, clock: Callable[[], float] = time.monotonic,
) -> Result:  # fmt: skip
    """Search for at most about `budget_s` seconds. Raises TuneError: E-TUN-BUDGET, E-TUN-PROVIDER, E-TUN-SHAPE, E-TUN-WRITE, E-TUN-KEY.

    `key` and `environment` default to those of the provider's sources and this machine; `clock` is for tests.
    """
    search = Search(provider, problem, store, budget_s, runner, key=key, environment=environment, clock=clock)
    found = search.space
    first = [*search.seeds(), *found.start(provider.tuning.first(problem) if provider.tuning else None, top, diverse)]
    if not search.take(first):
        return search.finish("budget")
    rho = search.ranking()
    if rho is not None and rho < RANKED and len(found.ranked) > len(first):
        search.result.notes.append(f"the cost model ranks the first candidates with a Spearman correlation of {rho:.2f}: the search is widened")
        # what was learned corrects the ranking; what nobody looked at yet it cannot know
        if not search.take(found.start(None, top, 2 * diverse)):
            return search.finish("budget")
    idle, descending = 0, False
    while True:
        best = search.result.best
        if best is None:
            return search.finish("no candidate is right")
        assert best.seconds is not None
        if search.result.bound >= NEAR_BOUND * best.seconds:
            return search.finish(f"within {1 - NEAR_BOUND:.0%} of the bound")
        fresh, gain = search.promising()
        if gain < LEAST_GAIN:  # what was learned points nowhere: the last look is next to the best
            descending = True
        if descending:
            fresh = search.descent(best.config)
        if not fresh:
            return search.finish("no neighbour is left")
        if not search.take(fresh):
            return search.finish("budget")
        now = search.result.best
        assert now is not None and now.seconds is not None
        gained = now.seconds < best.seconds * (1 - LEAST_GAIN)
        if descending and not gained:
            return search.finish(f"under {LEAST_GAIN:.0%} gained in a round")
        idle = 0 if gained else idle + 1
        descending = idle >= _IDLE


def exhaustive(provider: Provider, problem: Problem, store: Store, runner: Runner, *, budget_s: float = 1e9, **more: Any) -> Result:
    """Try every legal configuration."""
    search = Search(provider, problem, store, budget_s, runner, **more)
    search.take(search.space.ranked)
    return search.finish("all tried")


def random_search(
    provider: Provider, problem: Problem, store: Store, runner: Runner, trials: int, *, seed: int = 0, budget_s: float = 1e9, **more: Any
) -> Result:
    """Try `trials` legal configurations in random order."""
    search = Search(provider, problem, store, budget_s, runner, **more)
    order = sorted(search.space.ranked, key=space.text_of)
    random.Random(seed).shuffle(order)
    search.take(order[:trials])
    return search.finish("all tried" if trials >= len(order) else f"{trials} trials")
