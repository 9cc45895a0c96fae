"""The machine that the cost model predicts for: measured constants where `effllm doctor --calibrate` was run, else defaults.

CPU constants, per second unless marked:
    bandwidth   bytes read with all threads          single      bytes read with one thread
    issue       vector instructions of one thread    product     multiply-adds of one thread in PyTorch's 16-bit matrix product
    product32   the same in fp32                     call        s to call an op          wake   s to hand work to further threads
    cores       threads in use

GPU constants are the fields of gpus.Gpu; those measured replace those of the data sheet one by one.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import torch

from effllm.autotune import fingerprint, gpus
from effllm.errors import KernelError
from effllm.runtime.host import cache_root

Constants = dict[str, float]

# a present server core: good enough for ranking until the machine is calibrated
DEFAULTS: Constants = {"bandwidth": 3e10, "single": 2.4e10, "issue": 3.3e9, "product": 1.0e11, "product32": 5e10, "call": 8e-6, "wake": 3e-6}
NAMES = tuple(DEFAULTS)


def path_of(environment: fingerprint.Environment) -> Path:
    """Where the constants of a machine are kept."""
    return cache_root() / "machines" / f"{environment.kind}-{environment.hard_digest}.json"


@functools.lru_cache(maxsize=8)
def _stored(threads: int) -> tuple[tuple[str, float], ...] | None:
    del threads  # part of the fingerprint
    try:
        found = json.loads(path_of(fingerprint.environment("cpu")).read_text())["constants"]
        return tuple((name, float(found[name])) for name in NAMES)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def cpu() -> Constants:
    """Constants of this CPU with torch's present number of threads."""
    threads = torch.get_num_threads()
    stored = _stored(threads)
    found = dict(stored) if stored else DEFAULTS | {"bandwidth": min(DEFAULTS["single"] * threads, DEFAULTS["single"] * (0.6 + 0.4 * min(threads, 8)))}
    return found | {"cores": float(threads)}


def gpu(device: str) -> Constants:
    """Constants of a GPU, for CPU tensors (Triton's interpreter) and without a GPU those of gpus.DEFAULT.

    bandwidth, call (s of a launch), sms, clock, latency, l2, smem (bytes per multiprocessor), and the flops per second of 16-bit, 8-bit and
    fp32 products: mma16, mma8, mma32.
    """
    where = torch.device(device)
    if where.type != "cuda" or not torch.cuda.is_available():
        return gpus.constants(gpus.DEFAULT)
    return dict(_gpu(torch.cuda.current_device() if where.index is None else where.index))


@functools.cache
def _gpu(index: int) -> Constants:
    with torch.cuda.device(index):
        return gpus.constants(gpus.of(torch.device("cuda", index))) | measured_gpu(fingerprint.environment("cuda"))


def measured_gpu(environment: fingerprint.Environment) -> Constants:
    """Those constants of a GPU that a calibration has stored; empty without one, or where its file is damaged."""
    try:
        found = json.loads(path_of(environment).read_text())["constants"]
        return {name: float(value) for name, value in found.items() if name in gpus.NAMES and float(value) > 0}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def is_calibrated(device: str = "cpu") -> bool:
    """Whether `cpu`, or `gpu` of a device, returns measured constants."""
    if torch.device(device).type == "cpu":
        return _stored(torch.get_num_threads()) is not None
    return torch.cuda.is_available() and bool(measured_gpu(fingerprint.environment(device)))


def keep(constants: Constants, device: str = "cpu") -> Path:
    """Store measured constants: of this CPU with its number of threads, or of a GPU. Raises KernelError (E-KRN-CACHE) where that is not possible."""
    environment = fingerprint.environment(device)
    where = path_of(environment)
    try:
        where.parent.mkdir(parents=True, exist_ok=True)
        temporary = where.with_name(f".{where.name}.{os.getpid()}")
        temporary.write_text(json.dumps({"constants": constants, "environment": dict(environment.hard)}, indent=1))
        os.replace(temporary, where)
    except OSError as error:
        raise KernelError("E-KRN-CACHE", f"cannot write {where}: {error.strerror}", "make it writable, or set XDG_CACHE_HOME") from error
    _stored.cache_clear()
    _gpu.cache_clear()
    return where
