"""Decoding behind long contexts, compressed caches beside a dense one, weights equal: rate, bytes per token, memory (see docs/kv-caches.md).

    python -m benchmarks.kv_context [--contexts 1024,4096,16384,32768] [--caches dense,kivi-4,mustafar-70] [--layers 16] [--tokens 8] [--rounds 5]
        [--base dense]

A Llama of the shape of a 1B model with random weights at 4 bits and 8-bit activations, compiled by effllm. Layers differ in memory and not in value:
one is packed and copied. Caches are filled with random keys and values, so no prompt is read. `dense` is a static cache with effllm's own decode
kernel, which reads only what the mask shows. One graph per cache serves all contexts. `torch-static` is the same compiled step with torch's attention
in place of that kernel, `torch-dynamic` and `quanto-4`, `quanto-2` (these need optimum-quanto) the same packed model, not compiled, with transformers'
own growing caches and torch's attention: in `benchmarks.torch_caches`. `--base` names the cache that ratios are over.
`cache_bytes` are those of the tokens held, `predicted` the formula with the dense window. `peak_bytes` is what the process grew by while it decoded.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import effllm
from benchmarks import torch_caches
from benchmarks.kv_quality import METHODS
from effllm.autotune.machine import describe
from effllm.hf import variants
from effllm.hf.cache import CompressedCache
from effllm.hf.variants import Shape, Variant

RESULTS = Path(__file__).parent / "results" / "kv_context.json"


def llama(layers: int) -> Any:
    """16 layers are 1.2 billion weights."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=1, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=65536,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16().eval().requires_grad_(False)
    effllm.compress(model, "w4a8")
    first = model.model.layers[0]
    for i in range(1, layers):
        layer = copy.deepcopy(first)
        layer.self_attn.layer_idx = i
        model.model.layers.append(layer)
    config.num_hidden_layers = layers
    config.layer_types = None
    return model


@torch.no_grad()
def fill(variant: Variant, tokens: int) -> None:
    """Random keys and values into every layer, the first layer's in all of them."""
    cache = variant.runner._cache
    g = torch.Generator().manual_seed(1)
    for n, layer in enumerate(cache.layers):
        if isinstance(cache, CompressedCache):
            if n == 0:
                _, _, heads, _, dim = layer.ring.shape
                for at in range(0, tokens, 2048):
                    k, v = (torch.randn(1, heads, min(2048, tokens - at), dim, generator=g).to(layer.ring.dtype) for _ in range(2))
                    layer.append(k, v)
            else:
                for name in ("pages", "ring", "lens"):
                    getattr(layer, name).copy_(getattr(cache.layers[0], name))
        elif n == 0:
            for t in (layer.keys, layer.values):
                t.copy_(torch.randn(t.shape, generator=g))
        else:
            layer.keys.copy_(cache.layers[0].keys)
            layer.values.copy_(cache.layers[0].values)


def behind(variant: Variant, tokens: int) -> int:
    """Let the cache end after so many tokens, fewer where pages begin elsewhere; the tokens that it holds."""
    if isinstance(variant.runner, torch_caches.Growing):
        return variant.runner.behind(tokens)
    cache = variant.runner._cache
    if not isinstance(cache, CompressedCache):
        for layer in cache.layers:
            layer.cumulative_length.fill_(tokens)
        return tokens
    fmt = cache.format
    flushed = max(0, tokens - fmt.window - fmt.page) // fmt.page * fmt.page
    for layer in cache.compressed:
        layer.lens.copy_(torch.tensor([flushed + fmt.window + 1, flushed]))
    return flushed + fmt.window + 1


def held_bytes(variant: Variant, tokens: int) -> tuple[float, float]:
    """Bytes of the cache's tensors that hold the tokens, and what the formula says."""
    if isinstance(variant.runner, torch_caches.Growing):
        return variant.runner.cache_bytes, variant.runner.cache_bytes
    cache, layers = variant.runner._cache, len(variant.runner._cache.layers)
    if not isinstance(cache, CompressedCache):
        size = variant.runner.cache_bytes * tokens / variant.runner.length
        return size, size
    layer, fmt = cache.compressed[0], cache.format
    _, _, heads, _, dim = layer.ring.shape
    pages = (tokens - fmt.window - 1) // fmt.page
    ring = layer.ring.numel() * layer.ring.element_size()
    return layers * (pages * layer.pages.shape[2] + ring), layers * (pages * fmt.page * fmt.bytes_per_token(heads, dim, layer.ring.dtype) + ring)


def build(names: list[str], layers: int, longest: int) -> list[Variant]:
    """One model, one runner per cache, each compiled by its first step."""
    model, shape = llama(layers), Shape(prompt=longest, tokens=256, prefill=64)
    made = []
    for name in names:
        if name in torch_caches.GROWING:
            v = Variant(name, None, model, torch_caches.Growing(name, model, longest))
        else:
            kv = None if name in ("dense", "torch-static") else METHODS[name].spec
            v = variants.packed("w4a8", model, shape, compile_prefill=False, kv=kv)
            v.name = name
            fill(v, longest)
        start = time.perf_counter()
        with torch_caches.torch_attention() if name == "torch-static" else contextlib.nullcontext():
            decode(v, behind(v, 1024), 2)
        v.notes.append(f"compiled in {time.perf_counter() - start:.0f} s")
        print(name, v.notes[-1], flush=True)
        made.append(v)
    return made


def decode(v: Variant, at: int, count: int) -> float:
    """Seconds for tokens behind `at` held ones."""
    token = torch.tensor([[5]])
    start = time.perf_counter()
    for i in range(count):
        logits: Tensor = v.runner.decode_step(token, torch.tensor([[at + i]]))
        token = logits.argmax(-1, keepdim=True)
    return time.perf_counter() - start


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes; 0 where the system does not tell."""
    try:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    except (OSError, StopIteration):
        return 0
    return int(line.split()[1]) * 1024


def measure(made: list[Variant], contexts: list[int], tokens: int, rounds: int, base: str) -> list[dict[str, Any]]:
    """One row per context and cache; caches take turns."""
    rows = []
    for context in contexts:
        times: dict[str, list[float]] = {v.name: [] for v in made}
        grown = dict.fromkeys(times, 0)
        for _ in range(rounds + 1):
            for v in made:
                at, before = behind(v, context), resident("VmRSS")
                times[v.name].append(decode(v, at, tokens) / tokens)
                grown[v.name] = max(grown[v.name], resident("VmRSS") - before)
        over = statistics.median(times[base][1:])
        for v in made:
            taken, held = times[v.name][1:], behind(v, context)
            t, (size, predicted) = statistics.median(taken), held_bytes(v, held)
            row = {"context": held, "cache": v.name, "ms": 1e3 * t, "low_ms": 1e3 * min(taken), "high_ms": 1e3 * max(taken), "tok_s": 1 / t}
            row |= {"base": base, "times_base": over / t, "bytes_per_token": size / held, "predicted": predicted / held}
            rows.append(row | {"peak_bytes": grown[v.name]})
    return rows


def main() -> None:
    """Build, run, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="1024,4096,16384,32768")
    parser.add_argument("--caches", default="dense,kivi-4,mustafar-70")
    parser.add_argument("--base", default="dense")
    parser.add_argument("--out", type=Path, default=RESULTS)
    for name, default in (("layers", 16), ("tokens", 8), ("rounds", 5), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    contexts = [int(c) for c in args.contexts.split(",")]
    caches = args.caches.split(",")
    if args.base not in caches:
        parser.error(f"--base {args.base} is not among --caches {args.caches}")
    rows = measure(build(caches, args.layers, max(contexts)), contexts, args.tokens, args.rounds, args.base)
    store(rows, args.layers, args.threads, args.out)


def store(rows: list[dict[str, Any]], layers: int, threads: int, out: Path) -> None:
    """To a file and the screen."""
    out.write_text(json.dumps({"machine": describe(), "layers": layers, "threads": threads, "rows": rows}, indent=1) + "\n")
    for r in rows:
        times = f"{r['times_base']:.2f} times {r['base']}"
        print(f"{r['context']:6} {r['cache']:14} {r['ms']:.1f} ms ({r['low_ms']:.1f} to {r['high_ms']:.1f})  {times}  {r['bytes_per_token']:.0f} bytes a token")


if __name__ == "__main__":
    main()
