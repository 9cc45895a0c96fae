"""Which configuration runs: what was measured, by the store's ladder, else the cost model's first choice. Nothing is measured here."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from effllm.autotune.key import Key
from effllm.autotune.store import Store, open_store
from effllm.errors import TuneError
from effllm.lowering.op import Config, Problem, Provider


@dataclass(frozen=True)
class Choice:
    """A configuration (None: the kernel decides at each call, for dynamic rows), how it was found, and a line for a Decision."""

    config: Config | None
    how: str
    note: str

    @property
    def source(self) -> str:
        """How the configuration was found, in a word or two: "measured", "stale", "near", "cost model", "dynamic" or "fixed"."""
        words = {"exact": "measured", "soft-stale": "stale", "near M bucket": "near", "near shape": "near", "model": "cost model"}
        return words.get(self.how, self.how)

    @property
    def reason(self) -> str:
        """The note where something was measured, for a Decision; empty where there is nothing to add to `source`."""
        return "" if self.how in ("model", "dynamic", "fixed") and "no measurements" not in self.note else self.note


_providers: dict[tuple[str, str], Provider] = {}  # by name and op: problems alone are the cache's key


def choose(provider: Provider, problem: Problem) -> Choice:
    """The configuration of a problem. Cached: call `forget` after new measurements."""
    _providers[provider.name, problem.op] = provider
    return _cached(provider.name, problem)


@functools.lru_cache(maxsize=8192)
def _cached(name: str, problem: Problem) -> Choice:
    return look_up(_providers[name, problem.op], problem)


def forget() -> None:
    """Look everything up again."""
    _cached.cache_clear()


def look_up(provider: Provider, problem: Problem, store: Store | None = None) -> Choice:
    """The configuration of a problem, without the cache."""
    tuning = provider.tuning
    if tuning is None:
        return Choice(None, "fixed", "the kernel has one configuration")
    if problem.m is None:
        return Choice(None, "dynamic", "dynamic rows: the kernel switches paths where the cost model says")
    if problem.m == 0:
        return Choice(tuning.first(problem.at(1)), "model", "no rows")
    try:
        found = (store or open_store()).find(Key.of(problem, provider.name), lambda config: tuning.legal(problem, config))
    except TuneError as error:  # sources that cannot be hashed, such as a provider from outside of effllm
        return Choice(tuning.first(problem), "model", f"cost model; no measurements: {error.cause}")
    if found is not None:
        return Choice(dict(found.config), found.how, found.note)
    return Choice(tuning.first(problem), "model", "cost model; not tuned for this problem")
