"""Prefill of many prompts of very different lengths: packed, padded to the longest, in batches sorted by length, and one by one.

    python -m benchmarks.prepack [--threads 2] [--prompts 64] [--rounds 3] [--dtype bfloat16] [--name prepack] [--append] [--without padded]

Lengths are log-normal like those of MMLU questions (median 60 tokens, the longest 400 to 500). "bound": the packed forwards with attention left out,
which is what the sum of the lengths costs in linears alone. Keys, values and logits of every prompt are compared to its own run (fp32)
before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.timing import RESULTS, save
from effllm.hf import texts
from effllm.hf.demo import load_demo
from effllm.hf.engine import Engine, Piece
from effllm.runtime.prepack import Packing, prepack


def make_prompts(tokenizer: Any, count: int, seed: int = 0, longest: int = 500) -> list[Tensor]:
    """Pieces of the evaluation text."""
    draw = random.Random(seed)
    lengths = [min(longest, max(8, round(draw.lognormvariate(math.log(60), 0.8)))) for _ in range(count)]
    ids = texts.windows(tokenizer, texts.evaluation_text().text, sum(lengths), 1)[0]
    return list(ids.split(lengths))


def packed(engine: Engine, packing: Packing, rows: list[Any], attention: bool = True) -> Tensor:
    """Logits (prompts, V) by bins."""
    out: list[Any] = [None] * len(rows)
    for members in packing.bins:
        for i in members:
            rows[i].length = 0
        if not attention:
            engine._forward(*without_table(packing, rows, members))
            continue
        for i, logits in zip(members, engine.run([Piece(rows[i], packing.prompts[i]) for i in members]), strict=True):
            out[i] = logits
    return torch.stack(out) if attention else torch.empty(0)


def without_table(packing: Packing, rows: list[Any], members: tuple[int, ...]) -> tuple[Tensor, ...]:
    """A bin's forward with an empty table: every linear, no attention."""
    ids = torch.cat([packing.prompts[i] for i in members])
    positions = torch.cat([torch.arange(len(packing.prompts[i])) for i in members])
    where = torch.cat([rows[i].start + torch.arange(len(packing.prompts[i])) for i in members])
    last = torch.cumsum(torch.tensor([len(packing.prompts[i]) for i in members]), 0) - 1
    return ids, positions, where, torch.empty(0, 4, dtype=torch.int32), last


@torch.no_grad()
def padded(model: Any, prompts: list[Tensor]) -> Tensor:
    """Logits (prompts, V) of one batch, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.stack([torch.cat([torch.zeros(longest - len(p), dtype=torch.int64), p]) for p in prompts])
    mask = torch.stack([torch.arange(longest) >= longest - len(p) for p in prompts]).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    out: Tensor = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=DynamicCache(config=model.config), logits_to_keep=1).logits
    return out[:, -1]


def by_length(model: Any, prompts: list[Tensor], batch: int) -> None:
    """Batches of `batch` prompts of similar length."""
    order = sorted(prompts, key=len)
    for i in range(0, len(order), batch):
        padded(model, order[i : i + batch])


def check(model: Any, prompts: list[Tensor], capacity: int) -> dict[str, float]:
    """Largest difference to single runs, in fp32: logits, keys and values of every prompt in every layer."""
    packing = prepack(prompts, capacity)
    engine = Engine(model, packing.tokens)
    rows = [engine.open(len(p)) for p in prompts]
    logits = packed(engine, packing, rows)
    worst = {"logits": 0.0, "keys": 0.0, "values": 0.0}
    for prompt, row, mine in zip(prompts, rows, logits, strict=True):
        cache = DynamicCache()
        with torch.no_grad():
            theirs = model(prompt[None], past_key_values=cache, logits_to_keep=1).logits[0, -1]
        worst["logits"] = max(worst["logits"], float((mine - theirs).abs().max()))
        for layer, want in enumerate(cache.layers):
            k, v = engine.cache.read(layer, row.start, row.length)
            worst["keys"] = max(worst["keys"], float((k - want.keys).abs().max() / want.keys.abs().max()))
            worst["values"] = max(worst["values"], float((v - want.values).abs().max() / want.values.abs().max()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--capacity", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--skip-check", action="store_true")
    parser.add_argument("--only-check", action="store_true")
    parser.add_argument("--without", action="append", default=[], help="a variant to leave out; may be given several times")
    parser.add_argument("--append", action="store_true", help="keep the result file's variants that are not timed now")
    parser.add_argument("--name", default="prepack")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_demo(torch.float32)
    prompts = make_prompts(tokenizer, args.prompts)
    worst = {} if args.skip_check else check(model, prompts, args.capacity)
    if worst and not worst["keys"] < 1e-4:
        raise SystemExit(f"packed and single runs differ: {worst}")
    print("differences to single runs, fp32:", worst)
    if args.only_check:
        return
    model.to(getattr(torch, args.dtype))
    packing = prepack(prompts, args.capacity)
    engine = Engine(model, packing.tokens)
    rows = [engine.open(len(p)) for p in prompts]
    calls = {
        "packed": lambda: packed(engine, packing, rows),
        "bound": lambda: packed(engine, packing, rows, attention=False),
        "one by one": lambda: [padded(model, [p]) for p in prompts],
        "sorted, batches of 8": lambda: by_length(model, prompts, 8),
        "padded": lambda: padded(model, prompts),
    }
    calls = {name: call for name, call in calls.items() if name not in args.without}
    padded(model, prompts[:1])  # warm-up: a whole call of each would take longer than what is measured
    packed(engine, prepack(prompts[:2]), rows[:2])
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(args.rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - begin)
    times = {name: statistics.median(t) for name, t in taken.items()}
    about = {
        "prompts": len(prompts), "tokens": packing.tokens, "padded_tokens": packing.padded_tokens, "longest": max(map(len, prompts)), "bins": len(packing.bins),
    }  # fmt: skip
    old = RESULTS / f"{args.name}.json"
    if args.append and old.exists():
        kept = {r["variant"]: r["all"] for r in json.loads(old.read_text())["rows"]}
        taken = {n: kept.get(n, []) + taken.get(n, []) for n in [*taken, *(k for k in kept if k not in taken)]}
        times = {n: statistics.median(t) for n, t in taken.items()}
        worst = worst or json.loads(old.read_text())["machine"].get("differences", {})
    base = {"packed": times["packed"], "bound": times["bound"]}
    result = [
        {"variant": n, "seconds": t, "tok_s": packing.tokens / t, "over_packed": t / base["packed"], "over_bound": t / base["bound"], "all": taken[n]}
        for n, t in times.items()
    ]
    save(args.name, result, threads=args.threads, dtype=args.dtype, capacity=args.capacity, rounds=args.rounds, differences=worst, **about)


if __name__ == "__main__":
    main()
