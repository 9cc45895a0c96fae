"""Measurements that are shipped with the package: a store that is only read, in effllm/autotune/tables.

They hold for a machine of the very same hard fingerprint and for the very same kernel sources, as any measurement does; elsewhere they
are not looked at. A search takes what they say as a seed and measures it again; without a search they stand between the user's own
measurements of a problem and those of its neighbours. `keep_best` makes them from a store.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from effllm.autotune.fingerprint import Environment, environment
from effllm.autotune.key import Key
from effllm.autotune.ladder import Found, Legal
from effllm.autotune.measurement import Measurement
from effllm.autotune.store import Store

FOLDER = Path(__file__).parent / "tables"
OWN = ("exact", "soft-stale")  # rungs of the ladder that are about the problem itself


@functools.lru_cache(maxsize=4)
def shipped(folder: Path) -> Store | None:
    """The store of the package; None where nothing was shipped."""
    return Store(folder) if folder.is_dir() and any(folder.glob("*.jsonl")) else None


def find(own: Found | None, key: Key, legal: Legal | None = None, where: Environment | None = None, folder: Path | None = None) -> tuple[Found | None, bool]:
    """What to run, and whether it was shipped: `own` where it is about this problem, else what was shipped for it, else `own`."""
    store = shipped(folder or FOLDER)
    if store is None or (own is not None and own.how in OWN):
        return own, False
    found = store.find(key, legal, where or environment(key.device))
    if found is None or (own is not None and found.how not in OWN):
        return own, False
    return found, True


def keep_best(source: Store, folder: Path) -> int:
    """Write the fastest right measurement of each key, machine and software of a store to a folder of tables; how many were new.

    Raises TuneError (E-TUN-WRITE).
    """
    newest: dict[tuple[str, str, str], Measurement] = {m.slot: m for m in source.load()}
    best: dict[tuple[str, str, str], Measurement] = {}
    for m in newest.values():
        at = (m.key.text, m.environment.hard_digest, m.environment.soft_digest)
        if m.seconds is not None and m.seconds < _seconds(best, at):
            best[at] = m
    added = Store(folder).merge(best.values())
    for lock in folder.glob("*.lock"):  # only read from here on
        lock.unlink()
    shipped.cache_clear()
    return added


def _seconds(best: Mapping[tuple[str, str, str], Measurement], at: tuple[str, str, str]) -> float:
    found = best.get(at)
    return float("inf") if found is None or found.seconds is None else found.seconds
