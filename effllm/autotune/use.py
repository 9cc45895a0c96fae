"""Which configuration runs: what was measured, by the store's ladder, else the cost model's first choice. Nothing is measured here."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from effllm.autotune import machines, tables
from effllm.autotune.fingerprint import environment
from effllm.autotune.key import Key
from effllm.autotune.store import Store, open_store
from effllm.errors import TuneError
from effllm.lowering.op import OPS, Config, Problem, Provider


@dataclass(frozen=True)
class Choice:
    """A configuration (None: the kernel decides at each call, for dynamic rows), how it was found, and a line for a Decision."""

    config: Config | None
    how: str
    note: str

    @property
    def source(self) -> str:
        """How the configuration was found, in a word or two: "measured", "stale", "near", "shipped", "cost model", "dynamic" or "fixed"."""
        words = {"exact": "measured", "soft-stale": "stale", "near M bucket": "near", "near shape": "near", "model": "cost model"}
        return words.get(self.how, self.how)

    @property
    def reason(self) -> str:
        """The note where something was measured, for a Decision; empty where there is nothing to add to `source`."""
        return "" if self.how in ("model", "dynamic", "fixed") and "no measurements" not in self.note else self.note


_ROOT = Path(__file__).resolve().parents[1]
_CODE = (_ROOT / "kernels" / "cpu", _ROOT / "lowering", _ROOT / "autotune")  # what turns a graph op into a call

_providers: dict[tuple[str, str], Provider] = {}  # by name and op: problems alone are the cache's key


def choose(provider: Provider, problem: Problem) -> Choice:
    """The configuration of a problem. Cached: call `forget` after new measurements."""
    known = _providers.get((provider.name, problem.op))
    if known is not provider:
        _providers[provider.name, problem.op] = provider
        if known is not None:  # another provider took the name
            _cached.cache_clear()
    return _cached(provider.name, problem)


@functools.lru_cache(maxsize=8192)
def _cached(name: str, problem: Problem) -> Choice:
    return look_up(_providers[name, problem.op], problem)


_forgetters: list[Callable[[], object]] = []


def on_forget(clear: Callable[[], object]) -> None:
    """Register what empties a cache of choices elsewhere, such as one in front of a launch."""
    _forgetters.append(clear)


@functools.lru_cache(maxsize=8)
def stamp(device: str) -> str:
    """Eight hex digits that change with the measurements and machine constants of a device type, and with the code of its kernels."""
    digest = hashlib.sha256()
    for path in _CODE:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    where = environment(device)
    constants = machines.path_of(where)
    digest.update(constants.read_bytes() if constants.exists() else b"")
    store = open_store()
    for op in sorted(OPS):
        journal = store.path(where, op)
        digest.update(f"{op} {journal.stat().st_size if journal.exists() else 0}".encode())
    digest.update(str(torch.get_num_threads()).encode())
    return digest.hexdigest()[:8]


def forget() -> None:
    """Look everything up again."""
    _cached.cache_clear()
    stamp.cache_clear()
    for clear in _forgetters:
        clear()


def look_up(provider: Provider, problem: Problem, store: Store | None = None) -> Choice:
    """The configuration of a problem, without the cache."""
    tuning = provider.tuning
    if tuning is None:
        return Choice(None, "fixed", "the kernel has one configuration")
    if problem.m is None:
        return Choice(None, "dynamic", "dynamic rows: the kernel switches paths where the cost model says")
    if problem.m == 0:
        return Choice(tuning.first(problem.at(1)), "model", "no rows")
    if torch.device(problem.device).type == "cuda" and not torch.cuda.is_available():  # traced for a GPU that is elsewhere
        return Choice(tuning.first(problem), "model", "cost model; no GPU here whose measurements could apply")
    try:
        key = Key.of(problem, provider.name)
        own = (store or open_store()).find(key, lambda config: tuning.legal(problem, config))
        found, was_shipped = tables.find(own, key, lambda config: tuning.legal(problem, config))
    except TuneError as error:  # sources that cannot be hashed, such as a provider from outside of effllm
        return Choice(tuning.first(problem), "model", f"cost model; no measurements: {error.cause}")
    if found is not None:
        return Choice(dict(found.config), "shipped" if was_shipped else found.how, f"shipped with effllm, {found.note}" if was_shipped else found.note)
    return Choice(tuning.first(problem), "model", "cost model; not tuned for this problem")
