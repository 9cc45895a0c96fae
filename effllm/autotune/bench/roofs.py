"""The machine's roofs, measured in the same run as the kernels: bytes read per second, and products of PyTorch's own matmul."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from effllm.autotune import machine, machines

SIZE = 1024  # of the square matrices; 4096 on a GPU


def measure(device: str = "cpu") -> dict[str, Any]:
    """read_bandwidth_gb_s, bf16_gflops, fp32_gflops; the cost model's constants, and whether those were measured here."""
    found: dict[str, Any] = {"read_bandwidth_gb_s": machine.measure_bandwidth(device=device, nbytes=1 << (30 if device == "cuda" else 28))}
    for name, dtype in (("bf16_gflops", torch.bfloat16), ("fp32_gflops", torch.float32)):
        found[name] = _product(dtype, device) / 1e9
    if device == "cpu":
        return found | {"constants": machines.cpu(), "calibrated": machines.is_calibrated()}
    return found | {"constants": machines.gpu(device), "calibrated": False}


def _product(dtype: torch.dtype, device: str, repeats: int = 4) -> float:
    """Flops per second of a square product: the best of a few."""
    size = 4 * SIZE if device == "cuda" else SIZE
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    wait: Callable[[], Any] = torch.cuda.synchronize if device == "cuda" else lambda: None
    best = float("inf")
    for _ in range(repeats + 1):
        wait()
        start = time.perf_counter()
        a @ b
        wait()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
