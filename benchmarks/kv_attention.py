"""Decode attention over a long cache: compressed formats beside dense bf16 (torch's SDPA and effllm's own dense kernel), checked, interleaved.

    python -m benchmarks.kv_attention [--tokens 16384] [--threads 2] [--rounds 15] [--only kivi-4] [--heads 32] [--kv-heads 8] [--dim 128]

One query per head over `--layers` caches in turn, so that no cache stays in the processor's from call to call. Each variant is compared with
attention over its own decompressed keys and values in fp32 before it is timed. `gb_s` counts the bytes a call has to read. Results go to
benchmarks/results/kv_attention.json, one entry per shape and thread count. A method is one entry of METHODS in kv_quality.py; where optimum-quanto is
installed, transformers' 2- and 4-bit caches are compared, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import is_optimum_quanto_available

from benchmarks import torch_caches
from benchmarks.kv_quality import METHODS
from effllm.autotune.machine import describe, measure_bandwidth
from effllm.lowering import providers
from effllm.runtime.caches.layer import Layer

RESULTS = Path(__file__).parent / "results" / "kv_attention.json"
DENSE = ("sdpa", "sdpa-repeated", "own-dense")
Variant = tuple[list[Callable[[], Tensor]], list[Tensor], int]  # one call a layer, what it should give, bytes a call reads


def dense(name: str, q: Tensor, states: list[tuple[Tensor, Tensor]]) -> Variant:
    """Dense attention of q (1, H, 1, D) over keys and values (1, G, T, D)."""
    groups, scale = q.shape[1] // states[0][0].shape[1], q.shape[-1] ** -0.5
    attend = torch.nn.functional.scaled_dot_product_attention
    want = [attend(q.float(), k.float(), v.float(), enable_gqa=True) for k, v in states]
    if name == "sdpa":
        calls = [lambda k=k, v=v: attend(q, k, v, enable_gqa=True) for k, v in states]
    elif name == "sdpa-repeated":  # what transformers does under a mask
        calls = [lambda k=k, v=v: attend(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)) for k, v in states]
    else:
        providers.load("cpu")
        from effllm.lowering.op import Problem

        kernel = providers.select(Problem("decode_attention", q.shape[1], q.shape[3], 0, 0, False, m=1, dtype=q.dtype))[0].name
        calls = [lambda k=k, v=v: torch.ops.effllm.decode_attention(q, k, v, None, scale, kernel) for k, v in states]
    return calls, want, 2 * states[0][0].numel() * 2


def compressed(spec: str, q: Tensor, states: list[tuple[Tensor, Tensor]]) -> Variant:
    """Fused attention over a compressed cache."""
    layers = []
    for k, v in states:
        layer = Layer(spec, k.shape[2])
        layer.allocate(k, v)
        layer.append(k, v)
        layers.append(layer)
    want = [layer.attend(q.float(), kernel="reference") for layer in layers]
    return [lambda layer=layer: layer.attend(q) for layer in layers], want, layers[0].pages.numel() + layers[0].ring.numel() * 2


def transformers_cache(name: str, q: Tensor, states: list[tuple[Tensor, Tensor]]) -> Variant:
    """A layer of transformers' QuantizedCache, which restores all tokens at every step, and torch's attention."""
    from transformers.cache_utils import Fp8QuantizedLayer

    attend, calls, want, size = torch.nn.functional.scaled_dot_product_attention, [], [], 0
    for k, v in states:
        layer = Fp8QuantizedLayer() if name == "transformers-fp8" else torch_caches.quanto_layer(int(name[-1]))
        layer.update(k[:, :, :-1], v[:, :, :-1])
        state = dict(vars(layer))

        def call(layer: Any = layer, state: dict[str, Any] = state, k: Tensor = k[:, :, -1:], v: Tensor = v[:, :, -1:]) -> Tensor:
            vars(layer).update(state)  # every call appends the same token
            keys, values = layer.update(k, v)
            return attend(q, keys, values, enable_gqa=True)

        size = 2 * k.numel() if name == "transformers-fp8" else torch_caches.packed_bytes(layer)
        keys, values = layer.update(k[:, :, -1:], v[:, :, -1:])
        want.append(attend(q.float(), keys.float(), values.float(), enable_gqa=True))
        calls.append(call)
    return calls, want, size


def measure(variants: dict[str, Variant], rounds: int) -> dict[str, list[float]]:
    """Seconds a call, round robin."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, (calls, _, _) in variants.items():
            start = time.perf_counter()
            for call in calls:
                call()
            times[name].append((time.perf_counter() - start) / len(calls))
    return times


@torch.inference_mode()
def run(a: argparse.Namespace) -> dict[str, Any]:
    """Build, check and time."""
    g = torch.Generator().manual_seed(0)
    shape = (1, a.kv_heads, a.tokens, a.dim)
    states = [(torch.randn(shape, generator=g).bfloat16(), torch.randn(shape, generator=g).bfloat16()) for _ in range(a.layers)]
    q = torch.randn(1, a.heads, 1, a.dim, generator=g).bfloat16()
    only = [n for n in a.only.split(",") if n]
    variants = {name: dense(name, q, states) for name in DENSE}
    variants |= {name: compressed(m.spec, q, states) for name, m in METHODS.items() if m.make is None and name != "dense" and (not only or name in only)}
    own = ("transformers-fp8", "transformers-quanto-4", "transformers-quanto-2")  # those that are named and not installed raise ImportError
    present = own if is_optimum_quanto_available() else own[:1]
    variants |= {name: transformers_cache(name, q, states) for name in (present if not only else own) if not only or name in only}
    errors = {}
    for name, (calls, want, _) in variants.items():
        errors[name] = max(float((call().float() - w).norm() / w.norm()) for call, w in zip(calls, want, strict=True))
        assert errors[name] < 8e-3, (name, errors[name])  # bf16 results
    measure(variants, 2)
    times = measure(variants, a.rounds)
    base = statistics.median(times["sdpa"])
    rows = []
    for name, (_, _, size) in variants.items():
        t = statistics.median(times[name])
        row = {"variant": name, "ms": 1e3 * t, "low_ms": 1e3 * min(times[name]), "high_ms": 1e3 * max(times[name]), "times_sdpa": base / t}
        rows.append(row | {"bytes": size, "gb_s": size / t / 1e9, "error": errors[name]})
    about = {"tokens": a.tokens, "heads": a.heads, "kv_heads": a.kv_heads, "dim": a.dim, "layers": a.layers, "threads": a.threads, "rounds": a.rounds}
    return about | {"read_bandwidth_gb_s": measure_bandwidth(), "rows": rows}


def main() -> None:
    """Run, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 16384), ("threads", 2), ("rounds", 15), ("heads", 32), ("kv-heads", 8), ("dim", 128), ("layers", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path, default=RESULTS)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    found = run(a)
    keys = ("tokens", "heads", "kv_heads", "dim", "threads")
    runs = json.loads(a.out.read_text())["runs"] if a.out.exists() else []
    runs = [r for r in runs if any(r[k] != found[k] for k in keys)] + [found]
    a.out.write_text(json.dumps({"machine": describe(), "runs": runs}, indent=1) + "\n")
    for r in found["rows"]:
        times = f"{r['ms']:.3f} ms ({r['low_ms']:.3f} to {r['high_ms']:.3f})  {r['times_sdpa']:.2f}x"
        print(f"{r['variant']:21} {times}  {r['gb_s']:.1f} GB/s  error {r['error']:.1e}")


if __name__ == "__main__":
    main()
