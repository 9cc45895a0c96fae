"""The machine that the cost model predicts for: measured constants where `effllm doctor --calibrate` was run, else defaults.

CPU constants, per second unless marked:
    bandwidth   bytes read with all threads          single      bytes read with one thread
    issue       vector instructions of one thread    product     multiply-adds of one thread in PyTorch's 16-bit matrix product
    product32   the same in fp32                     call        s to call an op          wake   s to hand work to further threads
    cores       threads in use
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import torch

from effllm.autotune import fingerprint
from effllm.kernels.cpu import build

Constants = dict[str, float]

# a present server core: good enough for ranking until the machine is calibrated
DEFAULTS: Constants = {"bandwidth": 3e10, "single": 2.4e10, "issue": 3.3e9, "product": 1.0e11, "product32": 5e10, "call": 3e-6, "wake": 3e-6}
NAMES = tuple(DEFAULTS)


def path_of(environment: fingerprint.Environment) -> Path:
    """Where the constants of a machine are kept."""
    return build.cache_dir().parent / "machines" / f"{environment.kind}-{environment.hard_digest}.json"


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
    """Constants of a GPU: bandwidth, call (s of a launch), and per second the flops of 16-bit, 8-bit and fp32 products."""
    from effllm.kernels.triton import machine

    found = machine.of(torch.device(device))
    return {"bandwidth": found.bandwidth, "call": found.launch, "mma16": found.mma16, "mma8": found.mma8, "mma32": found.sms * 256 * found.clock}


def is_calibrated() -> bool:
    """Whether `cpu` returns measured constants."""
    return _stored(torch.get_num_threads()) is not None


def keep(constants: Constants) -> Path:
    """Store measured constants for this CPU and number of threads. Raises KernelError (E-KRN-CACHE) where that is not possible."""
    from effllm.errors import KernelError

    where = path_of(fingerprint.environment("cpu"))
    try:
        where.parent.mkdir(parents=True, exist_ok=True)
        temporary = where.with_name(f".{where.name}.{os.getpid()}")
        temporary.write_text(json.dumps({"constants": constants, "environment": dict(fingerprint.environment("cpu").hard)}, indent=1))
        os.replace(temporary, where)
    except OSError as error:
        raise KernelError("E-KRN-CACHE", f"cannot write {where}: {error.strerror}", "make it writable, or set XDG_CACHE_HOME") from error
    _stored.cache_clear()
    return where
