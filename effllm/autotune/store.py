"""The tuning store: every measurement ever made, one file per kind of machine and op, and the lookup in them.

Files are named KIND-HARDDIGEST.OP.jsonl (measurement.py has the line, journal.py the way it is written). A line that cannot be used
is skipped, listed in `Store.damage` with file, line number and reason, and warned about once per state of the file. A lookup never writes.
"""

from __future__ import annotations

import functools
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from effllm.autotune import artifacts, journal, ladder
from effllm.autotune.fingerprint import Environment
from effllm.autotune.fingerprint import environment as environment_of
from effllm.autotune.key import Key
from effllm.autotune.measurement import LineError, Measurement, Shared, decode, encode
from effllm.runtime.host import cache_root


@dataclass(frozen=True)
class Damage:
    """A line that was skipped. `line` counts from 1; 0 stands for the whole file. `newer` where a later version of effllm wrote it."""

    file: Path
    line: int
    reason: str
    newer: bool = False

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.reason}"


@dataclass(frozen=True)
class Compaction:
    """What `compact` did, in lines over all files."""

    files: int
    kept: int
    dropped: int
    damaged: int


@dataclass
class _File:
    stamp: journal.Stamp | None
    index: ladder.Index
    damage: list[Damage] = field(default_factory=list)
    kept: list[tuple[bytes, Measurement | None]] = field(default_factory=list)  # usable lines; None: of a newer format
    bad: list[bytes] = field(default_factory=list)


def default_directory() -> Path:
    """The store's place in the user's cache directory (XDG_CACHE_HOME/effllm/tuning)."""
    return cache_root() / "tuning"


class Store:
    """Measurements in a directory. Several processes may use one directory at the same time."""

    def __init__(self, directory: Path | str | None = None) -> None:
        self.directory = Path(directory) if directory is not None else default_directory()
        self._files: dict[Path, _File] = {}

    @property
    def damage(self) -> list[Damage]:
        """Lines that were skipped in the files read so far."""
        return [d for file in self._files.values() for d in file.damage]

    def path(self, environment: Environment, op: str) -> Path:
        """The file of an op's measurements on a machine."""
        return self.directory / _name(environment, op)

    def paths(self, op: str | None = None) -> list[Path]:
        """All files of the store, or those of one op on any machine."""
        return [p for p in sorted(self.directory.glob("*.jsonl")) if op is None or p.name.split(".", 1)[1] == f"{op}.jsonl"]

    def load(self, op: str | None = None) -> list[Measurement]:
        """All usable measurements, of one op or of all, on any machine, oldest first within a file."""
        return [m for path in self.paths(op) for m in self._read(path).index.entries]

    def find(self, key: Key, legal: ladder.Legal | None = None, environment: Environment | None = None) -> ladder.Found | None:
        """The configuration to run for a key on this machine, None where nothing applies (ladder.py has the order).

        `legal` says whether a configuration may still run; `environment` is that of the key's device unless given.
        """
        where = environment or environment_of(key.device)
        found = ladder.find(self._read(self.path(where, key.op)).index, key, where, legal)
        if found is not None:
            artifacts.record(found.entry)
        return found

    def results(self, key: Key, environment: Environment | None = None) -> dict[str, Measurement]:
        """Configuration (as canonical JSON) -> its newest measurement for exactly this key with the present hardware and software."""
        where = environment or environment_of(key.device)
        entries = self._read(self.path(where, key.op)).index.by_key.get(key.text, [])
        return {m.config_text: m for m in entries if m.environment.soft == where.soft}

    def stale(self, key: Key, environment: Environment) -> Measurement | None:
        """The fastest right measurement of exactly this key on the same hardware with other software; None where there is none."""
        entries = self._read(self.path(environment, key.op)).index.by_key.get(key.text, [])
        newest = {m.config_text: m for m in entries if m.environment.soft != environment.soft}
        return min((m for m in newest.values() if m.seconds is not None), key=lambda m: m.seconds or 0.0, default=None)

    def append(self, measurement: Measurement) -> Measurement:
        """Write a measurement to disk; returned with its sequence number. Raises TuneError (E-TUN-WRITE) where it cannot be kept."""
        path = self.path(measurement.environment, measurement.key.op)
        with journal.writing(path):
            written = self._write(path, [measurement])[0]
        artifacts.record(written)
        return written

    def merge(self, measurements: Iterable[Measurement]) -> int:
        """Add measurements of another store; how many were new. One that is not newer (by wall time) than what is here is left out.

        Raises TuneError (E-TUN-WRITE).
        """
        groups: dict[Path, list[Measurement]] = defaultdict(list)
        for m in measurements:
            groups[self.path(m.environment, m.key.op)].append(m)
        added = 0
        for path, group in groups.items():
            with journal.writing(path):
                here = self._read(path).index.by_key
                latest: dict[tuple[str, str, str], float] = {}
                for text in {m.key.text for m in group}:
                    for m in here.get(text, ()):
                        latest[m.slot] = max(m.when, latest.get(m.slot, m.when))
                fresh = []
                for m in sorted(group, key=lambda m: m.when):
                    if m.slot not in latest or m.when > latest[m.slot]:
                        latest[m.slot] = m.when
                        fresh.append(m)
                if fresh:
                    self._write(path, fresh)
                added += len(fresh)
        return added

    def compact(self) -> Compaction:
        """Keep the newest line per key, configuration and software; move damaged lines to FILE.damaged. Raises TuneError (E-TUN-WRITE).

        Each file is replaced in one step. Lines of a newer format stay as they are.
        """
        totals = Compaction(0, 0, 0, 0)
        for path in self.paths():
            with journal.writing(path):
                file = _parse(path)
                newest = {m.slot: m.seq for m in file.index.entries}
                kept = [line for line, m in file.kept if m is None or newest[m.slot] == m.seq]
                journal.replace(path, kept, file.bad)
            totals = Compaction(
                totals.files + 1, totals.kept + len(kept), totals.dropped + len(file.kept) - len(kept), totals.damaged + len(file.bad)
            )
            self._files.pop(path, None)
        return totals

    def _write(self, path: Path, measurements: list[Measurement]) -> list[Measurement]:
        """Number and append; the file's lock is held."""
        before, known = journal.stamp(path), self._files.get(path)
        numbered: list[Measurement] = []

        def make(tail: list[bytes]) -> bytes:
            last = _last_sequence(tail)
            if last is None:  # the tail is all damaged
                last = max((m.seq for m in _parse(path).index.entries), default=0)
            numbered.extend(replace(m, seq=last + i) for i, m in enumerate(measurements, start=1))
            return b"\n".join(encode(m) for m in numbered)

        journal.append(path, make)
        if known is not None and known.stamp == before:  # spares reading the file again after each measurement of a search
            for m in numbered:
                known.index.add(m)
            known.stamp = journal.stamp(path)
        return numbered

    def _read(self, path: Path) -> _File:
        try:
            now = journal.stamp(path)
            known = self._files.get(path)
            if known is None or known.stamp != now:
                known = self._files[path] = _parse(path)
                known.kept, known.bad = [], []  # only compaction needs the text
                _warn(known.damage)
        except OSError as error:
            known = self._files[path] = _File(None, ladder.Index(), [Damage(path, 0, f"cannot be read: {error.strerror}")])
            _warn(known.damage)
        return known


@functools.cache
def _opened(directory: Path) -> Store:
    return Store(directory)


def open_store(directory: Path | None = None) -> Store:
    """This process's one Store of a directory (default: the user's cache), so that a file is read again only after it changed."""
    return _opened((directory or default_directory()).absolute())


def _name(environment: Environment, op: str) -> str:
    return f"{environment.kind}-{environment.hard_digest}.{op}.jsonl"


def _parse(path: Path) -> _File:
    """Read a file. Raises OSError; a missing file is an empty one."""
    now = journal.stamp(path)
    if now is None:
        return _File(None, ladder.Index())
    file, shared = _File(now, ladder.Index()), Shared()
    entries: list[Measurement] = []
    for number, line in enumerate(journal.lines(path), start=1):
        if not line.strip():
            continue
        try:
            m = decode(line, shared)
            if path.name != _name(m.environment, m.key.op):
                raise LineError("of another machine or op than the file")
        except LineError as error:
            file.damage.append(Damage(path, number, str(error), error.newer))
            if error.newer:
                file.kept.append((line, None))
            else:
                file.bad.append(line)
        else:
            entries.append(m)
            file.kept.append((line, m))
    file.index = ladder.Index(entries)
    return file


def _last_sequence(tail: list[bytes]) -> int | None:
    """The number of the last usable line; 0 for an empty file, None where no line is usable."""
    for line in reversed(tail):
        if line.strip():
            try:
                return decode(line).seq
            except LineError:
                continue
    return None if any(line.strip() for line in tail) else 0


def _warn(damage: list[Damage]) -> None:
    if damage:
        more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
        warnings.warn(f"effllm: tuning store: skipped {damage[0]}{more}; `effllm cache compact` sets damaged lines aside", stacklevel=4)
