"""What the cost model must know of a GPU: data-sheet numbers by capability class, the size of the actual chip where one is present."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Machine:
    """One GPU. Rates are per second; `mma16` and `mma8` dense matrix flops for 16-bit and int8 operands; `latency` of a loaded memory read."""

    name: str
    sms: int
    clock: float
    bandwidth: float
    l2: int
    mma16: float
    mma8: float
    smem: int = 100 << 10  # per multiprocessor
    latency: float = 700e-9
    launch: float = 1.5e-6  # one more kernel inside a CUDA graph, tail included
    warp: int = 32

    @property
    def issue(self) -> float:
        """Thread instructions per second (128 lanes per multiprocessor)."""
        return self.sms * 128 * self.clock


# Vendors' data sheets; the H200's latency and issue rate are the estimates of the design notes, to be fitted on a device.
MACHINES: dict[str, Machine] = {
    "cuda:80": Machine("A100", 108, 1.41e9, 1.555e12, 40 << 20, 312e12, 624e12, 164 << 10),
    "cuda:86": Machine("RTX 3090", 82, 1.70e9, 0.936e12, 6 << 20, 71e12, 284e12),
    "cuda:89": Machine("RTX 4090", 128, 2.52e9, 1.008e12, 72 << 20, 165e12, 660e12),
    "cuda:90": Machine("H200", 132, 1.98e9, 4.8e12, 50 << 20, 989e12, 1979e12, 227 << 10),
    "cuda:100": Machine("B200", 148, 1.85e9, 8.0e12, 126 << 20, 2250e12, 4500e12, 227 << 10),
    "hip:gfx942": Machine("MI300X", 304, 2.1e9, 5.3e12, 256 << 20, 1307e12, 2614e12, 64 << 10, warp=64),
}
DEFAULT = MACHINES["cuda:90"]


def by_class(name: str) -> Machine:
    """The nearest known machine: the class itself, or the newest CUDA class that is not newer."""
    if name in MACHINES:
        return MACHINES[name]
    if name.startswith("cuda:") and name[5:].isdigit():
        older = [int(key[5:]) for key in MACHINES if key.startswith("cuda:") and int(key[5:]) <= int(name[5:])]
        if older:
            return MACHINES[f"cuda:{max(older)}"]
    return DEFAULT


@functools.cache
def class_of(index: int) -> str:
    """The capability class of a present GPU: "cuda:90", "hip:gfx942"."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return "hip:" + str(properties.gcnArchName).split(":")[0]
    return f"cuda:{properties.major}{properties.minor}"


@functools.cache
def present(index: int) -> Machine:
    """The GPU `index` of this process: its class with the chip's own number of multiprocessors, cache and bus."""
    properties = torch.cuda.get_device_properties(index)
    known = by_class(class_of(index))
    l2 = int(getattr(properties, "L2_cache_size", 0)) or known.l2
    share = properties.multi_processor_count / known.sms
    clock, bus = getattr(properties, "memory_clock_rate", 0), getattr(properties, "memory_bus_width", 0)
    # kHz, two transfers per clock, bits
    bandwidth = clock * 1e3 * 2 * bus / 8 if clock and bus else known.bandwidth
    rates: dict[str, Any] = {"mma16": known.mma16 * share, "mma8": known.mma8 * share}
    return replace(known, name=properties.name, sms=properties.multi_processor_count, l2=l2, bandwidth=bandwidth, **rates)


def of(device: torch.device) -> Machine:
    """The machine behind a tensor's device; a CPU tensor (interpreter) gets the default one."""
    if device.type != "cuda":
        return DEFAULT
    return present(torch.cuda.current_device() if device.index is None else device.index)
