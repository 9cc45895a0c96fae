"""A directory that appears whole or not at all, and takes the place of an older one in one step."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import platform
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_AT_FDCWD, _EXCHANGE = -100, 2
# what a kernel, a C library or a file system without the exchange answers
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """A new sibling of `target` to write into; on a clean exit it is synced and put in target's place, on an error removed.

    A reader of `target` sees the old content or the new one, at any time and after any crash. What killed processes left beside
    `target` is removed first. Raises OSError.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(target)
    staging = target.parent / f".{target.name}.{_place()}-{os.getpid()}-{uuid.uuid4().hex[:12]}.tmp"
    staging.mkdir()
    try:
        yield staging
        for path in (*staging.rglob("*"), staging):
            sync(path)
        put_in_place(staging, target)
        sync(target.parent)
    finally:
        # holds the unfinished new content after an error, the replaced old content after success
        if staging.exists():
            shutil.rmtree(staging)


def remove_stale(target: Path) -> list[Path]:
    """Remove staging directories of `target` whose process is dead; returns them.

    Only those of this machine since its start and of this process namespace: of others nobody here can tell whether the process
    lives. A reused process id keeps a directory, never removes one. What was moved aside (.old) is the only copy as long as there
    is nothing at `target`, and stays.
    """
    form = re.compile(rf"\.{re.escape(target.name)}\.{_place()}-(\d+)-[0-9a-f]{{12}}\.(tmp|old)")
    removed = []
    for path in target.parent.iterdir():
        found = form.fullmatch(path.name)
        if found and not _alive(int(found[1])) and (found[2] == "tmp" or target.exists()):
            # another process may be removing it too
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path)
    return removed


def _place() -> str:
    """Where process ids mean the same: this host since it was started, and this process namespace."""
    parts = [platform.node()]
    for read in (lambda: Path("/proc/sys/kernel/random/boot_id").read_text(), lambda: os.readlink("/proc/self/ns/pid")):
        try:
            parts.append(read())
        except OSError:
            parts.append("")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def put_in_place(new: Path, target: Path) -> None:
    """Rename `new` to `target`; what was at `target` is at `new` afterwards."""
    if not target.exists():
        new.rename(target)
        return
    if exchange(new, target):
        return
    aside = new.with_suffix(".old")  # no atomic exchange here: the old directory is aside for an instant, but never gone
    target.rename(aside)
    try:
        new.rename(target)
    except OSError:
        aside.rename(target)
        raise
    aside.rename(new)


def exchange(a: Path, b: Path) -> bool:
    """Swap two directory entries atomically (Linux renameat2); False where the system cannot."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if call(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(b))
