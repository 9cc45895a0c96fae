"""Facts of this host that every layer may ask for: the processor's name and features, and the user's cache directory.

Below kernels and tuning, which both need them: the kernels to build and choose, the tuning to name machines and to keep files.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


def cache_root() -> Path:
    """The folder of everything that effllm keeps: the user's cache directory by the XDG convention."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "effllm"


def give_back() -> None:
    """Return freed memory to the system, which glibc does not do by itself for what lies between blocks in use; nothing where there is no glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


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
