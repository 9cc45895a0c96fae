"""Data sheets of GPUs by capability class, and the size of the actual chip where one is present. Imports no Triton.

The cost model reads them through autotune/machines.py, where measured constants take their place.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Gpu:
    """One GPU. Rates are per second; `mma16` and `mma8` dense matrix flops for 16-bit and int8 operands; `latency` of a loaded memory read."""

    name: str
    sms: int  # multiprocessors
    clock: float
    bandwidth: float  # bytes
    l2: int  # bytes
    mma16: float
    mma8: float
    smem: int = 100 << 10  # bytes of shared memory per multiprocessor
    latency: float = 700e-9
    call: float = 1.5e-6  # s of one more kernel inside a CUDA graph, tail included

    @property
    def mma32(self) -> float:
        """Flops per second in fp32, off the matrix cores: a multiply-add of each of 128 lanes per clock."""
        return self.sms * 128 * 2 * self.clock


# Vendors' data sheets; the H200's latency and issue rate are the estimates of the design notes, to be fitted on a device.
CLASSES: dict[str, Gpu] = {
    "cuda:80": Gpu("A100", 108, 1.41e9, 1.555e12, 40 << 20, 312e12, 624e12, 164 << 10),
    "cuda:86": Gpu("RTX 3090", 82, 1.70e9, 0.936e12, 6 << 20, 71e12, 284e12),
    "cuda:89": Gpu("RTX 4090", 128, 2.52e9, 1.008e12, 72 << 20, 165e12, 660e12),
    "cuda:90": Gpu("H200", 132, 1.98e9, 4.8e12, 50 << 20, 989e12, 1979e12, 227 << 10),
    "cuda:100": Gpu("B200", 148, 1.85e9, 8.0e12, 126 << 20, 2250e12, 4500e12, 227 << 10),
    "hip:gfx942": Gpu("MI300X", 304, 2.1e9, 5.3e12, 256 << 20, 1307e12, 2614e12, 64 << 10),
}
DEFAULT = CLASSES["cuda:90"]
NAMES = ("sms", "clock", "bandwidth", "l2", "mma16", "mma8", "mma32", "smem", "latency", "call")


def constants(gpu: Gpu) -> dict[str, float]:
    """What the cost model needs of a GPU, by the names of its symbols."""
    return {name: float(getattr(gpu, name)) for name in NAMES}


def by_class(name: str) -> Gpu:
    """The nearest known GPU: the class itself, or the newest CUDA class that is not newer."""
    if name in CLASSES:
        return CLASSES[name]
    if name.startswith("cuda:") and name[5:].isdigit():
        older = [int(key[5:]) for key in CLASSES if key.startswith("cuda:") and int(key[5:]) <= int(name[5:])]
        if older:
            return CLASSES[f"cuda:{max(older)}"]
    return DEFAULT


def class_of(properties: object) -> str:
    """The capability class of torch's device properties: "cuda:90", "hip:gfx942"."""
    if torch.version.hip:
        return "hip:" + str(getattr(properties, "gcnArchName", "")).split(":")[0]
    return f"cuda:{getattr(properties, 'major', 0)}{getattr(properties, 'minor', 0)}"


def of_properties(properties: object) -> Gpu:
    """The GPU behind torch's device properties: its class with the chip's own number of multiprocessors, caches and bus."""
    known = by_class(class_of(properties))

    def number(name: str) -> int:
        return int(getattr(properties, name, 0) or 0)  # torch versions differ in what they tell

    sms = number("multi_processor_count") or known.sms
    clock, bus = number("memory_clock_rate"), number("memory_bus_width")
    return replace(
        known,
        name=str(getattr(properties, "name", known.name)),
        sms=sms,
        l2=number("L2_cache_size") or known.l2,
        bandwidth=clock * 1e3 * 2 * bus / 8 if clock and bus else known.bandwidth,  # kHz, two transfers per clock, bits
        mma16=known.mma16 * sms / known.sms,
        mma8=known.mma8 * sms / known.sms,
    )


@functools.cache
def _present(index: int) -> Gpu:
    return of_properties(torch.cuda.get_device_properties(index))


def of(device: torch.device) -> Gpu:
    """The GPU behind a device; DEFAULT for a CPU tensor (Triton's interpreter) and where no GPU is present."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return DEFAULT
    return _present(torch.cuda.current_device() if device.index is None else device.index)
