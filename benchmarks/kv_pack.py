"""Packing pages of compressed caches on a CPU: what the C++ packers and the plain-torch encoders take.

    python -m benchmarks.kv_pack [--heads 8] [--dim 64] [--threads 2] [--rounds 9]

`page_ms`: one append that packs one page of every key head of one layer (batch 1, bf16), in the middle of decoding. `token_us`: the same spread over the
tokens of a page. `prompt_ms`: an append of 2048 tokens to an empty cache. Medians; both kernels are checked to leave the same bytes first, where the
format has a packer of its own. Rows go to benchmarks/results/kv_pack.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import lru_cache
from pathlib import Path

import torch

from effllm.autotune.machine import describe
from effllm.lowering import kv_cache, providers
from effllm.runtime.caches.layer import Layer
from effllm.runtime.caches.matryoshka import pack_tables

RESULTS = Path(__file__).parent / "results" / "kv_pack.json"
SPECS = (
    "kivi(bits=2)", "kivi(bits=4)", "kivi(bits=8)", "gear(bits=4)", "gear(bits=2,factors=8)",
    "mustafar(sparsity=0.5)", "mustafar(sparsity=0.7)", "mustafar(sparsity=0.7,bits=4)", "bfp(bits=4)",
    "matryoshka(k=0.5,v=0.5)",
)  # fmt: skip


@lru_cache(maxsize=8)
def tables(spec: str, heads: int, dim: int) -> list[torch.Tensor] | None:
    """Random bases for Matryoshka."""
    if not spec.startswith("matryoshka"):
        return None
    g = torch.Generator().manual_seed(1)
    uk, uv = (torch.linalg.qr(torch.randn(heads, dim, dim, generator=g)).Q for _ in range(2))
    return pack_tables(uk, torch.randn(heads, dim, generator=g), uv, torch.randn(heads, dim, generator=g))


def timed(kernel: str, spec: str, heads: int, dim: int, rounds: int) -> tuple[Layer, float, float]:
    """The cache, seconds of an append that packs one page, seconds of a prompt."""
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, heads, 2048, dim, generator=g).bfloat16() for _ in range(2))

    def empty() -> Layer:
        layer = Layer(spec, 4096, tables(spec, heads, dim))
        layer.allocate(k, v)
        return layer

    def append(layer: Layer, n: int) -> None:
        torch.ops.effllm.kv_append(layer.pages, layer.ring, layer.lens, layer.start, k[:, :, :n], v[:, :, :n], layer._tables, layer.spec, kernel)

    pages, prompts = [], []
    for _ in range(rounds):
        layer = empty()
        start = time.perf_counter()
        append(layer, 2048)
        prompts.append(time.perf_counter() - start)
        while int(layer.lens[0] - layer.lens[1]) < layer.ring.shape[3]:
            append(layer, 1)
        before = int(layer.lens[1])
        start = time.perf_counter()
        append(layer, 1)
        pages.append(time.perf_counter() - start)
        assert int(layer.lens[1]) == before + layer.format.page
    return layer, statistics.median(pages[1:]), statistics.median(prompts[1:])


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    providers.load("cpu")
    rows = []
    for spec in SPECS:
        own = Layer(spec, 64, tables(spec, args.heads, args.dim))
        own.allocate(*(torch.zeros(1, args.heads, 1, args.dim, dtype=torch.bfloat16) for _ in range(2)))
        kernel = kv_cache.choose("kv_append", "auto", own.spec, args.heads, own.ring, 1)
        held = {name: timed(name, spec, args.heads, args.dim, args.rounds) for name in (kernel, "reference")}
        assert torch.equal(held[kernel][0].pages, held["reference"][0].pages), spec
        for name, (layer, page, prompt) in held.items():
            tokens = layer.format.page
            rows.append({
                "cache": spec, "kernel": name, "heads": args.heads, "dim": args.dim, "threads": args.threads, "page_tokens": tokens,
                "page_ms": 1e3 * page, "token_us": 1e6 * page / tokens, "prompt_ms": 1e3 * prompt,
            })  # fmt: skip
            r = rows[-1]
            figures = f"page of {tokens} {r['page_ms']:.3f} ms, {r['token_us']:.2f} us a token, 2048 tokens {r['prompt_ms']:.2f} ms"
            print(f"{spec:32} {name:12} {figures}", flush=True)
    RESULTS.write_text(json.dumps({"machine": describe(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
