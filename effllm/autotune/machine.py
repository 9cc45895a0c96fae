"""What the machine is and how fast it reads memory: the roof next to which achieved bandwidth is printed."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from effllm.runtime.host import cpu_flags, cpu_name, field_of

BUFFER = 1 << 28  # bytes: beyond any last-level cache share of a small machine

_SLACK = 1 << 24  # bytes that the process may grow by between a reset and the look at it


def measure_bandwidth(threads: int | None = None, *, device: str = "cpu", nbytes: int = BUFFER, repeats: int = 5) -> float:
    """Read bandwidth in GB/s: the best of a few sums over a buffer of `nbytes`. Restores torch's thread count."""
    before = torch.get_num_threads()
    buffer = torch.ones(nbytes // 4, dtype=torch.float32, device=device)
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        best = float("inf")
        for _ in range(repeats + 1):
            start = time.perf_counter()
            buffer.sum().item()  # item() waits for the device
            best = min(best, time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return nbytes / best / 1e9


def describe() -> dict[str, Any]:
    """CPU, threads, memory, versions and the present load of the machine."""
    info: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": isa(),
        "memory_bytes": _kib("/proc/meminfo", "MemTotal"),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else [],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_average": os.getloadavg(),
    }
    return info


def isa() -> list[str]:
    """The vector extensions that matter here, of those the CPU reports."""
    flags = cpu_flags()
    x86 = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
    return [f for f in (*x86, "asimddp", "i8mm", "bf16", "sve", "sve2") if f in flags]


def peak_rss() -> int:
    """Highest resident set of this process in bytes since its start or the last `reset_peak_rss` (0 where /proc is missing)."""
    return _kib("/proc/self/status", "VmHWM")


def available_memory() -> int:
    """Bytes of memory that can be had without swapping (0 where /proc is missing)."""
    return _kib("/proc/meminfo", "MemAvailable")


def reset_peak_rss() -> bool:
    """Start a new peak at the present resident set; False where the kernel does not allow it, or takes the request and ignores it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return 0 < peak_rss() <= _kib("/proc/self/status", "VmRSS") + _SLACK


class OtherLoad:
    """Processor time that other processes, and other guests of the host, take between `start` and `cores`."""

    def __init__(self) -> None:
        self._wall, self._busy, self._own = time.monotonic(), _busy(), _own()

    def cores(self) -> float | None:
        """Mean number of cores that others kept busy since the object was made; None where /proc is missing."""
        wall, busy, own = time.monotonic() - self._wall, _busy(), _own()
        if busy is None or self._busy is None or wall <= 0:
            return None
        return max(0.0, (busy - self._busy) - (own - self._own)) / wall


def _busy() -> float | None:
    try:
        fields = [int(f) for f in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    t = os.times()
    return t.user + t.system + t.children_user + t.children_system


def _kib(path: str, key: str) -> int:
    value = field_of(key, Path(path))
    return int(value.split()[0]) * 1024 if value else 0
