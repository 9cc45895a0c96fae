"""Facts of this host that every layer may ask for: the processor's name and features, and the user's cache directory.

Below kernels and tuning, which both need them: the kernels to build and choose, the tuning to name machines and to keep files.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from pathlib import Path
from typing import Any

_CPUINFO = Path("/proc/cpuinfo")


def cache_root() -> Path:
    """The folder of everything that effllm keeps: the user's cache directory by the XDG convention."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "effllm"


@functools.cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # not glibc
        return None


def release_memory() -> None:
    """Give pages that are free inside of the C heap back to the system.

    glibc keeps what was freed in blocks of up to 32 MB for later, and what is stored between them keeps it from ever going back: where large temporaries
    and results that stay take turns the process grows by several times what stays.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The processor's feature flags as Linux names them; empty where unknown."""
    return frozenset((field_of("flags") or field_of("Features") or "").split())


@functools.cache
def cpu_name() -> str:
    """The processor's model name; on ARM, which has none, its implementer and part numbers."""
    part = " ".join(filter(None, (field_of("CPU implementer"), field_of("CPU part"))))
    return field_of("model name") or " ".join(filter(None, (platform.processor() or platform.machine(), part)))


def field_of(name: str, path: Path = _CPUINFO) -> str | None:
    """The first value of a `name : value` line of a /proc file; None where there is no such line or file."""
    try:
        for line in path.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    except OSError:
        return None
    return None
