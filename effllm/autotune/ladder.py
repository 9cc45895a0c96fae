"""From a key to a configuration: exact, else measured with other software, else at the nearest M bucket, else at the nearest (N, K).

Only measurements on the same hardware and of the same sources come here at all. A configuration whose newest result for this very
key is not ok is never taken, from whatever rung; one that the caller calls illegal is passed over and counted.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from effllm.autotune.fingerprint import Environment, Scalar
from effllm.autotune.key import SHAPE_FIELDS, Key
from effllm.autotune.measurement import Measurement


class Answer(Protocol):
    """What `legal` returns: lowering.op.Verdict, or anything with its two fields."""

    @property
    def ok(self) -> bool:
        """Whether the configuration may run."""

    @property
    def reason(self) -> str:
        """Why not."""


Legal = Callable[[Mapping[str, Scalar]], Answer]


@dataclass(frozen=True)
class Found:
    """A configuration to run. `seconds` is what was measured where it was found; `how` names the rung, `note` is a line for a Decision.

    `how` is "exact", "soft-stale", "near M bucket" or "near shape"; `stale` means measured with other software than the present.
    """

    config: Mapping[str, Scalar]
    seconds: float
    how: str
    stale: bool
    note: str
    entry: Measurement


class Index:
    """The measurements of one file, grouped the way the ladder asks for them; later ones follow earlier ones."""

    def __init__(self, entries: Iterable[Measurement] = ()) -> None:
        self.entries: list[Measurement] = []
        self.by_key: dict[str, list[Measurement]] = defaultdict(list)
        self.by_family: dict[str, list[Measurement]] = defaultdict(list)  # same but for M
        self.by_kind: dict[str, list[Measurement]] = defaultdict(list)  # same but for N and K
        for m in sorted(entries, key=lambda m: m.seq):
            self.add(m)

    def add(self, m: Measurement) -> None:
        """Add the newest measurement."""
        self.entries.append(m)
        self.by_key[m.key.text].append(m)
        self.by_family[m.key.family].append(m)
        self.by_kind[m.key.kind].append(m)


def find(index: Index, key: Key, environment: Environment, legal: Legal | None = None) -> Found | None:
    """The best configuration that the ladder finds, None where nothing applies."""
    refused: dict[str, str] = {}
    for how, entries in _rungs(index, key, environment):
        for entry in sorted(entries, key=lambda e: e.seconds or math.inf):
            verdict = legal(entry.config) if legal else None
            if verdict is not None and not verdict.ok:
                refused[entry.config_text] = verdict.reason
                continue
            stale = entry.environment.soft != environment.soft
            assert entry.seconds is not None  # ok entries have one
            return Found(entry.config, entry.seconds, how, stale, _note(how, key, entry, environment, refused), entry)
    return None


def _rungs(index: Index, key: Key, environment: Environment) -> Iterator[tuple[str, list[Measurement]]]:
    here = index.by_key.get(key.text, [])
    current, known = _newest(here, environment, stale=False), _newest(here)
    yield "exact", _ok(current, {})
    # what the present software has tried itself is not asked of another one
    yield "soft-stale", _ok(_newest(here, environment, stale=True), current)
    bad = {c: m for tried in (known, current) for c, m in tried.items() if m.status != "ok"}
    for entries in _nearest(index.by_family.get(key.family, []), lambda k: _rows_apart(k, key)):
        for stale in (False, True):
            yield "near M bucket", _ok(_newest(entries, environment, stale), bad)
    for entries in _nearest(index.by_kind.get(key.kind, []), lambda k: shape_apart(k, key)):
        for stale in (False, True):
            yield "near shape", _ok(_newest(entries, environment, stale), bad)


def _newest(entries: Iterable[Measurement], environment: Environment | None = None, stale: bool = False) -> dict[str, Measurement]:
    """Configuration -> its newest measurement, with the present software or (stale) any other; without an environment of all."""
    return {m.config_text: m for m in entries if environment is None or (m.environment.soft != environment.soft) == stale}


def _ok(tried: Mapping[str, Measurement], without: Mapping[str, Measurement]) -> list[Measurement]:
    return [m for config, m in tried.items() if m.status == "ok" and config not in without]


def _nearest(entries: Iterable[Measurement], apart: Callable[[Key], tuple[float, ...]]) -> list[list[Measurement]]:
    """The entries by key, nearest first, those at no distance left out."""
    groups: dict[tuple[float, ...], list[Measurement]] = defaultdict(list)
    for m in entries:
        groups[apart(m.key)].append(m)
    return [groups[d] for d in sorted(groups) if d[0] > 0]


def _rows_apart(a: Key, b: Key) -> tuple[float, float]:
    # of two buckets at one distance the larger: its tiles cover the rows
    return abs(math.log2(a.m_bucket / b.m_bucket)), -a.m_bucket


def shape_apart(a: Key, b: Key) -> tuple[float, ...]:
    """Distance of two keys in log2 (N, K), then the shape itself so that two shapes never share a place."""
    pairs = [(float(a.problem[f] or 0), float(b.problem[f] or 0)) for f in SHAPE_FIELDS if f in a.problem and f in b.problem]
    logs = [math.log2(x / y) if x > 0 and y > 0 else float(x != y) for x, y in pairs]
    return (math.hypot(*logs), *(x for x, _ in pairs))


def differing(a: Mapping[str, Scalar], b: Mapping[str, Scalar]) -> list[str]:
    """Names of the fields in which two mappings differ; a missing field differs from None."""
    return [f for f in (*a, *(g for g in b if g not in a)) if f not in a or f not in b or a[f] != b[f]]


def _note(how: str, key: Key, entry: Measurement, environment: Environment, refused: Mapping[str, str]) -> str:
    day = time.strftime("%Y-%m-%d", time.gmtime(entry.when))
    parts = [f"{how}: {(entry.seconds or 0) * 1e6:.1f} us measured {day}"]
    if how.startswith("near"):
        parts.append("at " + ", ".join(f"{f}={v} for {key.flat().get(f)}" for f, v in entry.key.flat().items() if v != key.flat().get(f)))
    soft, now = entry.environment.soft, environment.soft
    if soft != now:
        parts.append("stale: " + ", ".join(f"{f} was {soft.get(f)}, is {now.get(f)}" for f in differing(soft, now)))
    if refused:
        config, reason = next(iter(refused.items()))
        parts.append(f"{len(refused)} faster or nearer no longer legal, first {json.loads(config)}: {reason or 'no reason given'}")
    return "; ".join(parts)
