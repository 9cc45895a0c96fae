"""A directory that appears whole or not at all, and takes the place of an older one in one step."""

from __future__ import annotations

import ctypes
import errno
import os
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

    A reader of `target` sees the old content or the new one, at any time and after any crash. Raises OSError.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.parent / f".{target.name}.{uuid.uuid4().hex[:12]}.tmp"
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
