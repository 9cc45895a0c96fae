"""Measures the constants of the cost model on this CPU (machines.py names them), in a few seconds.

Each constant comes from the thing it stands for: reads of a large buffer and of a large weight by the kernel that does least besides, a
kernel whose weights lie in cache, PyTorch's own products, the smallest call of an op, the same call with all threads.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from effllm.autotune import inputs, machines
from effllm.autotune.machine import OtherLoad, measure_bandwidth
from effllm.errors import TuneError
from effllm.lowering import providers
from effllm.lowering.bipolar_linear import quantize_activation
from effllm.lowering.op import Config, Problem, Provider

_LARGE = (32768, 4096)  # (N, K) of an 8-bit weight of 128 MiB, which no last-level cache of a small machine keeps
BUSY = 0.5  # cores that others may keep busy before a measurement is refused


def measure(*, allow_load: bool = False) -> machines.Constants:
    """The constants of this CPU with torch's present number of threads, in the units of machines.py. About ten seconds.

    Raises TuneError: E-TUN-LOAD where other processes keep the machine busy, unless `allow_load`; E-TUN-KERNEL without compiled kernels.
    """
    provider, why = providers.select(Problem("bipolar_linear_a8", 256, 1024, 8, 128, False, "a8", 64))
    if provider.tuning is None:
        raise TuneError("E-TUN-KERNEL", f"only {provider.name!r} runs here: {why}", "install g++ (see effllm doctor), then calibrate")
    load, threads = OtherLoad(), torch.get_num_threads()
    # the kernels read several streams at once and may be faster than a sum over one: what bounds them is the faster of the two
    found = {"single": max(1e9 * measure_bandwidth(1), _reads(provider, 1)), "bandwidth": max(1e9 * measure_bandwidth(threads), _reads(provider, threads))}
    found["bandwidth"] = max(found.values())
    found["product"], found["product32"] = (_product(dtype) / threads for dtype in (torch.bfloat16, torch.float32))
    found["call"] = _linear(provider, 1, 16, 32, "registers", 1)
    alone, together = (_linear(provider, 1, 32 * threads, 32, "registers", t) for t in (1, threads))
    found["wake"] = max(0.0, together - alone)
    found["issue"] = _issue(provider, found["call"])
    busy = load.cores()
    if busy is not None and busy > BUSY and not allow_load:
        raise TuneError("E-TUN-LOAD", f"other processes kept {busy:.1f} cores busy meanwhile", "calibrate when the machine is quiet")
    return {name: found[name] for name in machines.NAMES}


def _reads(provider: Provider, threads: int, repeats: int = 5) -> float:
    """Bytes per second of one token times a large weight: the best of a few and of all configurations that read it as it is."""
    n, k = _LARGE
    problem = Problem("bipolar_linear_a8", n, k, 8, 0, False, "a8", 1)
    made = inputs.make(problem, provider.layout, copies=1)
    assert provider.tuning is not None
    best = float("inf")
    for config in provider.tuning.configs(problem):
        if config["threads"] == threads and config["path"] in ("registers", "single"):
            for _ in range(repeats):
                start = time.perf_counter()
                provider.call(*made.args[0], problem=problem, config=config)
                best = min(best, time.perf_counter() - start)
    return made.nbytes / best


def _issue(provider: Provider, call: float) -> float:
    """Vector instructions per second of one thread, as the model counts them, on weights that stay in cache."""
    problem = Problem("bipolar_linear_a8", 256, 1024, 8, 128, False, "a8", 64)
    assert provider.tuning is not None
    path = "unpack" if any(c["path"] == "unpack" for c in provider.tuning.configs(problem)) else "registers"
    counted = provider.tuning.predict(problem, _config(provider, problem, path, 1)).instructions
    return counted / max(1e-9, _linear(provider, problem.m or 1, problem.n, problem.k, path, 1) - call)


def _config(provider: Provider, problem: Problem, path: str, threads: int) -> Config:
    """The configuration of a path that the model ranks first."""
    assert provider.tuning is not None
    tuning = provider.tuning
    return min((c for c in tuning.configs(problem) if c["path"] == path and c["threads"] == threads), key=lambda c: tuning.predict(problem, c).seconds)


def _linear(provider: Provider, m: int, n: int, k: int, path: str, threads: int) -> float:
    """Median seconds of an 8-bit linear with int8 activations and hot caches."""
    g = torch.Generator().manual_seed(0)
    xq, xs = quantize_activation(torch.randn(m, k, generator=g))
    codes = torch.randint(0, 256, (n // 16, k // 32, 512), generator=g, dtype=torch.uint8)
    group = min(k, 128)
    scale = torch.rand(n // 16, k // group, 16, generator=g).half()
    problem = Problem("bipolar_linear_a8", n, k, 8, group, False, "a8", m)
    config = _config(provider, problem, path, threads)
    return _median(lambda: provider.call(xq, xs, codes, scale, None, None, n, 8, group, 127.5, torch.float32, problem=problem, config=config))


def _product(dtype: torch.dtype) -> float:
    """Multiply-adds per second of torch's matrix product with all threads."""
    a, b = torch.randn(512, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    return 512 * 1024 * 1024 / _median(lambda: torch.mm(a, b))


def _median(call: Callable[[], Any], seconds: float = 0.4) -> float:
    """Median time of a call over about that long, after a few calls to warm up."""
    for _ in range(3):
        call()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken) < 5:
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
