"""What compressed caches cost the demo model: perplexity of the 512 tokens behind a compressed prompt of 1536, as a ratio to dense.

    python -m benchmarks.kv_quality [--texts WHEEL] [--windows 4] [--only kivi-4,gear-2] [--threads 1]

Odd articles are cut into windows of 2048 tokens. The prompt is read once by the dense model; its keys and values go into each cache, and the
512 tokens that follow are scored in one pass: they see the compressed prompt and each other exact. `bytes` is of packed tokens per token
as stored, `formula` is the format's own count, `total` includes the dense window at 4096 tokens. Results go to
benchmarks/results/kv_quality.json, rows of other runs stay there. A method is one entry of METHODS.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks import kv_calibrated
from effllm.autotune.machine import describe
from effllm.hf import texts
from effllm.hf.cache import CompressedCache
from effllm.hf.demo import load_demo
from effllm.runtime.caches.base import parse

RESULTS = Path(__file__).parent / "results" / "kv_quality.json"
PROMPT, SCORED = 1536, 512


@dataclass(frozen=True)
class Method:
    """`spec` is the cache's text. `make(model, capacity)` gives (model to run, empty cache) where more than the text is needed: calibrated
    tables, permuted weights. A model of its own reads the prompt itself."""

    spec: str
    make: Callable[[Any, int], tuple[Any, CompressedCache]] | None = None


METHODS: dict[str, Method] = {
    "dense": Method("dense"),
    "kivi-8": Method("kivi(bits=8)"),
    "kivi-4": Method("kivi(bits=4)"),
    "kivi-2": Method("kivi(bits=2)"),
    "kivi-2-g32": Method("kivi(bits=2,group=32)"),
    "gear-4": Method("gear(bits=4)"),
    "gear-2": Method("gear(bits=2)"),
    "gear-2-l": Method("gear(bits=2,outliers=0)"),
    "gear-2-r4": Method("gear(bits=2,rank=4,outliers=0)"),
    "gear-2-g32": Method("gear(bits=2,group=32)"),
    "mustafar-50": Method("mustafar(sparsity=0.5)"),
    "mustafar-70": Method("mustafar(sparsity=0.7)"),
    "mustafar-50-b8": Method("mustafar(sparsity=0.5,bits=8)"),
    "mustafar-50-b4": Method("mustafar(sparsity=0.5,bits=4)"),
    "bfp-8": Method("bfp(bits=8,vbits=8)"),
    "bfp-4": Method("bfp(bits=4,vbits=4)"),
    "bfp-4-g16": Method("bfp(bits=4,vbits=4,block=16)"),
}


def fill(cache: CompressedCache, prompt: DynamicCache) -> None:
    """Put a dense cache's keys and values into an empty one."""
    for own, dense in zip(cache.compressed, prompt.layers, strict=True):
        own.update(dense.keys, dense.values)


def nll(model: Any, ids: Tensor, cache: Any) -> float:
    """Sum of negative log likelihoods of ids[PROMPT + 1:] after a cache of the first PROMPT tokens."""
    positions = torch.arange(PROMPT, PROMPT + SCORED)[None]
    logits = model(input_ids=ids[None, PROMPT:], position_ids=positions, past_key_values=cache, use_cache=True).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits.float(), ids[PROMPT + 1 :], reduction="sum"))


def sizes(fmt: str, heads: int, dim: int, dtype: torch.dtype) -> dict[str, float]:
    """Bytes of one layer and token, dense counted in 16 bits."""
    f = parse(fmt)
    layout, dense = f.layout(heads, dim, dtype), 4 * heads * dim
    pages = -(-(4096 - f.window - f.page) // f.page)
    total = (pages * layout.page + 4 * heads * (f.window + f.page) * dim) / 4096
    return {"bytes": layout.page / f.page, "formula": layout.payload / f.page, "share": layout.payload / f.page / dense, "total_share_4k": total / dense}


@torch.inference_mode()
def run(names: list[str], wheel: str | None, count: int) -> list[dict[str, Any]]:
    """One row per method."""
    model, tokenizer = load_demo(torch.float32)
    config = model.config
    text = texts.evaluation_text(wheel)
    windows = texts.windows(tokenizer, text.text, PROMPT + SCORED, count)
    sums, seconds = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    base = 0.0
    for n, ids in enumerate(windows):
        prompt = DynamicCache(config=config)
        model(input_ids=ids[None, :PROMPT], past_key_values=prompt, use_cache=True, logits_to_keep=1)
        for name in names:
            method, start = METHODS[name], time.perf_counter()
            own, cache = method.make(model, PROMPT + SCORED) if method.make else (model, CompressedCache(model, method.spec))
            if own is model:
                fill(cache, prompt)
            else:  # permuted, or attention that reports to the cache
                own(input_ids=ids[None, :PROMPT], past_key_values=cache, use_cache=True, logits_to_keep=1)
            seconds[name] += time.perf_counter() - start
            sums[name] += nll(own, ids, cache)
            print(f"window {n} {name}: {math.exp(sums[name] / (n + 1) / (SCORED - 1)):.4f}", flush=True)
        base += nll(model, ids, prompt)
    tokens = len(windows) * (SCORED - 1)
    heads, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    rows = []
    for name in names:
        figures = {"perplexity": math.exp(sums[name] / tokens), "ratio": math.exp((sums[name] - base) / tokens), "compress_s": seconds[name] / len(windows)}
        of = {"text": text.name, "tokens": tokens, "dense_perplexity": math.exp(base / tokens)}
        spec = METHODS[name].spec
        size = kv_calibrated.evicting_sizes(spec, heads, dim) if spec.startswith("ems") else sizes(spec, heads, dim, torch.bfloat16)
        rows.append({"method": name, "spec": spec if spec.startswith("ems") else parse(spec).spec} | figures | of | size)
    return rows


def main() -> None:
    """Run, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--only", default="")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--basis", help="a file of benchmarks/kv_basis.py, for Matryoshka with trained bases")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    METHODS.update(kv_calibrated.methods(args.texts, args.basis, Method))
    names = [n for n in args.only.split(",") if n] or list(METHODS)
    rows = run(names, args.texts, args.windows)
    kept = [r for r in (json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []) if r["method"] not in names]
    RESULTS.write_text(json.dumps({"machine": describe(), "rows": kept + rows}, indent=1) + "\n")
    for r in rows:
        print(f"{r['method']:12} {r['ratio']:.4f}  {r['bytes']:.0f} bytes, {r['share']:.1%} of 16 bits, {r['total_share_4k']:.1%} with the window at 4k")


if __name__ == "__main__":
    main()
