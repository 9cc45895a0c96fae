"""What compressed caches cost the demo model: the 512 tokens behind a compressed prompt of 1536, paired with the dense model window by window.

    python -m benchmarks.kv_quality [--texts WHEEL] [--windows 8] [--only kivi-4,gear-2] [--basis FILE] [--dtype float32] [--threads 1]

Odd articles are cut into windows of 2048 tokens. The prompt is read once by the dense model; its keys and values go into each cache, and the
512 tokens that follow are scored in one pass: they see the compressed prompt and each other exact.

`ratio` is perplexity over the dense model's on the same tokens; `ratio_se` its standard error, from differences of log-likelihood summed over
blocks of 73 tokens (neighbouring tokens are not independent). `kl` is the mean Kullback-Leibler divergence of the dense model's next-token distribution
from the cache's, in nats, which is far less noisy. `bytes` is of packed tokens per token as stored, `formula` the format's own count, `total_share_4k`
includes the dense window of 4096 tokens. Windows that benchmarks/results/kv_quality.json has already are not run again. A method is one entry of METHODS.
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

from benchmarks import kv_calibrated, torch_caches
from effllm.autotune.machine import describe
from effllm.hf import texts
from effllm.hf.cache import CompressedCache
from effllm.hf.demo import load_demo
from effllm.runtime.caches.base import parse

RESULTS = Path(__file__).parent / "results" / "kv_quality.json"
PROMPT, SCORED, BLOCK = 1536, 512, 73
KEYS = ("spec", "text", "dtype")  # of a row: what its windows have in common


@dataclass(frozen=True)
class Method:
    """`spec` is the cache's text. `make(model, capacity)` gives (model to run, empty cache) where more than the text is needed: calibrated
    tables, permuted weights. A model of its own reads the prompt itself."""

    spec: str
    make: Callable[[Any, int], tuple[Any, Any]] | None = None


METHODS: dict[str, Method] = {
    "dense": Method("dense"),
    "kivi-8": Method("kivi(bits=8)"),
    "kivi-4": Method("kivi(bits=4)"),
    "kivi-2": Method("kivi(bits=2)"),
    "kivi-2-g32": Method("kivi(bits=2,group=32)"),
    "gear-4": Method("gear(bits=4)"),
    "gear-2": Method("gear(bits=2)"),
    "gear-2-f8": Method("gear(bits=2,factors=8)"),
    "gear-2-f8-w0": Method("gear(bits=2,factors=8,window=0)"),
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
    "quanto-4": Method("quanto(bits=4)", lambda model, _: (model, torch_caches.quanto_cache(model, 4))),
    "quanto-2": Method("quanto(bits=2)", lambda model, _: (model, torch_caches.quanto_cache(model, 2))),
}


def fill(cache: Any, prompt: DynamicCache) -> None:
    """Put a dense cache's keys and values into an empty one."""
    for own, dense in zip(cache.compressed if isinstance(cache, CompressedCache) else cache.layers, prompt.layers, strict=True):
        own.update(dense.keys, dense.values)


def log_probabilities(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Of every next token, (SCORED - 1, vocabulary), after a cache of the first PROMPT tokens."""
    positions = torch.arange(PROMPT, PROMPT + SCORED)[None]
    logits = model(input_ids=ids[None, PROMPT:], position_ids=positions, past_key_values=cache, use_cache=True).logits[0, :-1]
    out: Tensor = logits.float().log_softmax(-1)
    return out


def compare(dense: Tensor, own: Tensor, ids: Tensor) -> dict[str, Any]:
    """What a window says: the dense model's summed loss, differences of loss per block of tokens, mean KL, share of equal best tokens."""
    target = ids[PROMPT + 1 :, None]
    a, b = dense.gather(1, target)[:, 0], own.gather(1, target)[:, 0]
    kl = (dense.exp() * (dense - own)).sum(1).mean()
    same = (dense.argmax(1) == own.argmax(1)).float().mean()
    return {"dense": float(-a.sum()), "blocks": [round(float(x.sum()), 5) for x in (a - b).split(BLOCK)], "kl": float(kl), "top1": float(same)}


def sizes(fmt: str, heads: int, dim: int, dtype: torch.dtype) -> dict[str, float]:
    """Bytes of one layer and token, dense counted in 16 bits."""
    f = parse(fmt)
    layout, dense = f.layout(heads, dim, dtype), 4 * heads * dim
    pages = -(-(4096 - f.window - f.page) // f.page)
    total = (pages * layout.page + 4 * heads * (f.window + f.page) * dim) / 4096
    return {"bytes": layout.page / f.page, "formula": layout.payload / f.page, "share": layout.payload / f.page / dense, "total_share_4k": total / dense}


def row(name: str, windows: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """Figures over the windows of one method."""
    held = list(windows.values())
    tokens = len(held) * (SCORED - 1)
    diffs = torch.tensor([x for w in held for x in w["blocks"]], dtype=torch.float64)
    ratio = math.exp(float(diffs.sum()) / tokens)
    error = float(diffs.std()) * math.sqrt(len(diffs)) / tokens
    kl = torch.tensor([w["kl"] for w in held], dtype=torch.float64)
    dense = math.exp(sum(w["dense"] for w in held) / tokens)
    spread = float(kl.std()) / math.sqrt(len(kl)) if len(kl) > 1 else math.nan
    figures = {"tokens": tokens, "dense_perplexity": dense, "perplexity": dense * ratio, "ratio": ratio, "ratio_se": ratio * error}
    top1, seconds = (sum(w[k] for w in held) / len(held) for k in ("top1", "compress_s"))
    more = {"kl": float(kl.mean()), "kl_se": spread, "top1": top1, "compress_s": seconds}
    return {"method": name} | about | figures | more | {"windows": windows}


def about(name: str, config: Any, text: str, dtype: str) -> dict[str, Any]:
    """What a row is of, and its sizes."""
    heads, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    spec = METHODS[name].spec
    if spec.startswith("quanto"):
        return {"spec": spec, "text": text, "dtype": dtype} | torch_caches.quanto_sizes(int(name[-1]), heads, dim)
    size = kv_calibrated.evicting_sizes(spec, heads, dim) if spec.startswith("ems") else sizes(spec, heads, dim, torch.bfloat16)
    return {"spec": spec if spec.startswith("ems") else parse(spec).spec, "text": text, "dtype": dtype} | size


def stored(out: Path) -> dict[str, dict[str, Any]]:
    """Rows of earlier runs."""
    return {r["method"]: r for r in json.loads(out.read_text())["rows"]} if out.exists() else {}


@torch.inference_mode()
def run(names: list[str], wheel: str | None, count: int, dtype: str, out: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """All rows by name, written to `out` after every method and window."""
    model, tokenizer = load_demo(getattr(torch, dtype))
    text = texts.evaluation_text(wheel)
    rows = stored(out)
    for n, ids in enumerate(texts.windows(tokenizer, text.text, PROMPT + SCORED, count)):
        what = {name: about(name, model.config, text.name, dtype) for name in names}
        known = {name: rows[name]["windows"] if name in rows and all(rows[name].get(k) == what[name][k] for k in KEYS) else {} for name in names}
        todo = [name for name in names if str(n) not in known[name]]
        if not todo:
            continue
        prompt = DynamicCache(config=model.config)
        model(input_ids=ids[None, :PROMPT], past_key_values=prompt, use_cache=True, logits_to_keep=1)
        exact = DynamicCache(config=model.config)
        for i, layer in enumerate(prompt.layers):
            exact.update(layer.keys, layer.values, i)
        dense = log_probabilities(model, ids, exact)
        for name in todo:
            method, start = METHODS[name], time.perf_counter()
            own, cache = method.make(model, PROMPT + SCORED) if method.make else (model, CompressedCache(model, method.spec))
            if own is model:
                fill(cache, prompt)
            else:  # permuted, or attention that reports to the cache
                own(input_ids=ids[None, :PROMPT], past_key_values=cache, use_cache=True, logits_to_keep=1)
            seconds = time.perf_counter() - start
            known[name][str(n)] = compare(dense, log_probabilities(own, ids, cache), ids) | {"compress_s": round(seconds, 3)}
            rows[name] = row(name, known[name], what[name])
            out.write_text(json.dumps({"machine": describe(), "rows": list(rows.values())}, indent=1) + "\n")
            r = rows[name]
            print(f"window {n} {name:18} {r['ratio']:.4f} +- {r['ratio_se']:.4f}  kl {r['kl']:.5f} +- {r['kl_se']:.5f}", flush=True)
    return rows


def main() -> None:
    """Run, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--only", default="")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--basis", help="a file of benchmarks/kv_basis.py, for Matryoshka with trained bases")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--dtype", default="float32", help="of the model; bfloat16 is faster and has a KL of its own, which the row `dense` shows")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    METHODS.update(kv_calibrated.methods(args.texts, args.basis, Method))
    # transformers' own layers are run by name alone: optimum-quanto is not part of the set-up
    names = [n for n in args.only.split(",") if n] or [n for n in METHODS if not n.startswith("quanto")]
    rows = run(names, args.texts, args.windows, args.dtype, args.out)
    for r in (rows[n] for n in names if n in rows):
        sizes = f"{r['bytes']:.0f} bytes, {r['share']:.1%} of 16 bits, {r['total_share_4k']:.1%} with the window at 4k"
        print(f"{r['method']:18} {r['ratio']:.4f} +- {r['ratio_se']:.4f}  kl {r['kl']:.5f} +- {r['kl_se']:.5f}  {sizes}")


if __name__ == "__main__":
    main()
