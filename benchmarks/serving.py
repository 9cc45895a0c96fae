"""What a long prompt does to sequences that are being decoded: read in chunks that fit a budget, and read at once.

    python -m benchmarks.serving [--threads 2] [--decodes 8] [--context 200] [--prompt 2048] [--slowdown 1.25] [--measured 512] [--recipe w4a8]

`decodes` sequences run; their time between tokens is taken while nothing else happens, then while a prompt is read in chunks (the budget
is measured first, see effllm.hf.replay.choose_budget), then with the same prompt read whole. Of the chunks only those of the last `measured`
tokens are timed, which see the most keys and are the dearest. Greedy tokens of the sequences are compared between the two.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import save
from effllm.compression import compress
from effllm.hf import texts
from effllm.hf.demo import load_demo
from effllm.hf.replay import choose_budget, percentiles
from effllm.hf.serving import Loop


def run(
    model: Any, ids: Tensor, decodes: int, context: int, prompt: int, budget: int, quiet: int, measured: int
) -> tuple[list[float], list[float], float, list[list[int]]]:
    """Seconds between tokens while only decoding and while the prompt is read, the prompt's time to its first token, and all tokens."""
    steps = 2 * quiet + 2 * -(-measured // max(1, budget - decodes)) + 20
    loop = Loop(model, budget=decodes * context, most=decodes + 1, slots=decodes * (context + steps) + prompt + 1, eos_token_id=[])
    made: list[list[int]] = [[] for _ in range(decodes)]
    for i in range(decodes):
        loop.submit(ids[i * context : (i + 1) * context], steps)
    while loop.scheduler.waiting or not all(r.decoding for r in loop.scheduler.running):
        for e in loop.step():
            made[e.index].append(e.token)

    def timed(until: Any) -> list[float]:
        times = []
        while not until(times):
            begin = time.perf_counter()
            events = loop.step()
            times.append(time.perf_counter() - begin)
            for e in events:
                if e.index < decodes:
                    made[e.index].append(e.token)
        return times

    loop.scheduler.budget = budget
    plain = timed(lambda t: len(t) == quiet)
    begin = time.perf_counter()
    long = loop.submit(ids[-prompt:], 1)
    if measured < prompt and budget < prompt:
        loop.scheduler.budget = decodes + prompt - measured
        timed(lambda t: len(t) == 1)
        loop.scheduler.budget = budget
        begin = time.perf_counter()
    mixed = timed(lambda t: bool(t) and long not in loop.memory.rows and not loop.scheduler.waiting)
    first = time.perf_counter() - begin
    plain += timed(lambda t: len(t) == quiet)  # before and after: sequences grow meanwhile
    assert all(r.decoding for r in loop.scheduler.running) and len(loop.scheduler.running) == decodes
    return plain, mixed, first, made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--decodes", type=int, default=8)
    parser.add_argument("--context", type=int, default=200)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--slowdown", type=float, default=1.25)
    parser.add_argument("--budget", type=int)
    parser.add_argument("--quiet", type=int, default=100)
    parser.add_argument("--measured", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--recipe")
    parser.add_argument("--name", default="serving")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_demo(getattr(torch, args.dtype))
    if args.recipe:
        compress(model, args.recipe)
    ids = texts.windows(tokenizer, texts.evaluation_text().text, args.decodes * args.context + args.prompt, 1)[0]
    budget = args.budget or choose_budget(model, args.decodes, args.context + args.quiet, args.prompt, args.slowdown)
    rows, kept = [], []
    for name, tokens in (("chunked", budget), ("whole prompt", args.decodes + args.prompt)):
        plain, mixed, first, made = run(model, ids, args.decodes, args.context, args.prompt, tokens, args.quiet, args.measured)
        alone, beside = percentiles(plain), percentiles(mixed)
        kept.append(made)
        row = {"policy": name, "budget": tokens, "steps_beside": len(mixed), "prompt_s": first, "p99_over_alone_p50": beside["p99"] / alone["p50"]}
        row |= {"p99_over_alone_p99": beside["p99"] / alone["p99"]}
        row |= {f"alone_{k}": v for k, v in alone.items()} | {f"beside_{k}": v for k, v in beside.items()}
        rows.append(row)
    shared = [min(len(a), len(b)) for a, b in zip(*kept, strict=True)]
    same = sum(a[:n] == b[:n] for a, b, n in zip(*kept, shared, strict=True))
    save(args.name, rows, threads=args.threads, dtype=args.dtype, recipe=args.recipe, decodes=args.decodes, context=args.context, prompt=args.prompt,
         slowdown=args.slowdown, measured=args.measured, sequences_with_equal_tokens=same)  # fmt: skip


if __name__ == "__main__":
    main()
