"""A file of lines that several processes append to, any of which may be killed at any time.

Every line is one write to a file opened for appending, under a lock, followed by fsync: a kill loses the line being written at most.
The lock is a file of its own, since compaction replaces the data file. Readers take no lock: what they may catch is an unfinished
last line, which is named like a damaged one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from effllm.errors import TuneError
from effllm.runtime.atomic import sync

Stamp = tuple[int, int, int]  # inode, size, modification time in ns: changes whenever the file does
_TAIL = 1 << 16  # bytes: more than the longest line by far


def stamp(path: Path) -> Stamp | None:
    """What tells one state of a file from another; None where there is no file. Raises OSError."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def lines(path: Path) -> list[bytes]:
    """The lines of a file without their newlines, an unfinished last one included. Raises OSError."""
    content = path.read_bytes()
    return content.split(b"\n")[: None if content and not content.endswith(b"\n") else -1]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Hold the file's lock; the folder is made. OSErrors inside become TuneError (E-TUN-WRITE)."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(f"{path.name}.lock"), "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise _refused(path, error) from error


def append(path: Path, make: Callable[[list[bytes]], bytes]) -> None:
    """Write `make(last lines)` as a new line; to be called while `writing`. Raises OSError, and leaves the file as it was then.

    `make` gets the last lines of the file, up to 64 KiB of them (the first may be cut).
    """
    new = not path.exists()
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(handle).st_size
        tail = os.pread(handle, _TAIL, max(0, size - _TAIL))
        # a writer that was killed may have left half a line: it must not swallow this one
        start = b"" if tail.endswith(b"\n") or not tail else b"\n"
        data = start + make(tail.split(b"\n")) + b"\n"
        try:
            if os.write(handle, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(handle)
        except OSError:
            with contextlib.suppress(OSError):  # the half line is then named by the next reader
                os.ftruncate(handle, size)
            raise
    finally:
        os.close(handle)
    if new:
        sync(path.parent)


def replace(path: Path, kept: list[bytes], damaged: list[bytes]) -> None:
    """Put `kept` in place of the file in one step, and add `damaged` to FILE.damaged first; while `writing`. Raises OSError."""
    for stale in path.parent.glob(f".{path.name}.*.tmp"):  # of a killed compaction: only the holder of the lock makes them
        stale.unlink()
    if damaged:
        aside = path.with_name(f"{path.name}.damaged")
        _write(aside, damaged, "ab")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        _write(temporary, kept, "wb")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def _write(path: Path, content: list[bytes], mode: str) -> None:
    with open(path, mode) as file:
        file.write(b"".join(line + b"\n" for line in content))
        file.flush()
        os.fsync(file.fileno())


def _refused(path: Path, error: OSError) -> TuneError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    advice = "free some space there" if full else "make it writable, set XDG_CACHE_HOME to a folder that is, or give the store another directory"
    return TuneError("E-TUN-WRITE", f"cannot write the tuning store {path}: {error.strerror or error}", advice)
