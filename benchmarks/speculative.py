"""Speculative decoding beside plain decoding on the demo model: the same greedy tokens, tokens a second, and why.

    python -m benchmarks.speculative [--threads 2] [--model demo] [--target w8] [--draft 4] [--new 96] [--rounds 3] [--shapes "chain(tokens=2)" ...]

Every variant continues the same prompts through `effllm.generate(..., compile=True)`; variants take turns, prompt by prompt. `tok_s` is tokens a
second after the first one, whatever happens meanwhile (the draft reads the prompt, too). `same` is the share of tokens before the first one
that differs from plain decoding: bf16 sums of one row and of several round differently, and ties fall either way. `predicted` is what the
parts say: tokens a round over (target forward of that many rows + draft forwards), in plain steps. `--target dense` leaves a dense
model as it is; `--draft` is then a recipe. `--model` is what the command line takes; a checkpoint is packed already.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import effllm
from benchmarks.timing import save
from effllm.compression import compress
from effllm.hf import texts
from effllm.hf.draft import draft_of, extra_bytes
from effllm.hf.models import is_packed, resolve
from effllm.hf.reader import Reader
from effllm.hf.speculative import Statistics
from effllm.hf.static_decoding import room
from effllm.hf.steps import Compiled
from effllm.runtime.packed import packed_weights
from effllm.runtime.speculation.settings import Speculation

SHAPES = ["chain(tokens=1)", "chain(tokens=2)", "chain(tokens=3)", "chain(tokens=6, stop=0.5)", "constant(branching=2x1)", "beam(width=2, depth=2)"]


def decode(model: Any, prompt: Tensor, new: int, **more: Any) -> tuple[list[int], float]:
    """Tokens, and seconds from the first to the last."""
    tokens, begin = [], 0.0
    for event in effllm.stream(model, [prompt], max_new_tokens=new, eos_token_id=[], compile=True, **more):
        tokens.append(event.token)
        if len(tokens) == 1:
            begin = time.perf_counter()
    return tokens, time.perf_counter() - begin


def step_seconds(model: Any, prompt: Tensor, rows: int, capacity: int, sight: bool, repeats: int = 15) -> Callable[[], float]:
    """Seconds of one compiled forward of that many rows behind the prompt; call it in turns with others."""
    reader = Reader(model, Compiled(), trees=sight)

    def run() -> float:
        with reader.on(capacity):
            reader.prompt(prompt)
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                at = list(range(len(prompt), len(prompt) + rows))
                reader.read([5] * rows, at, rows, torch.ones(rows, rows).tril().bool() if sight else None, at)
                times.append(time.perf_counter() - start)
                reader.cache.seek(len(prompt))
        return statistics.median(times)

    return run


def same(a: list[int], b: list[int]) -> int:
    """Tokens before the first that differs."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--model", default="demo")
    parser.add_argument("--target", default="w8")
    parser.add_argument("--draft", default="4")
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--name", default="speculative")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = resolve(args.model)
    if args.target != "dense" and not is_packed(args.model):
        compress(model, args.target)
    draft: int | str = int(args.draft) if args.draft.isdigit() else args.draft
    prompts = list(texts.windows(tokenizer, texts.evaluation_text().text, args.prompts * args.prompt, 1)[0].split(args.prompt))
    small = draft_of(model, draft)
    variants: dict[str, dict[str, Any]] = {"plain": {}} | {s: {"draft": draft, "speculative": s} for s in args.shapes}
    rates: dict[str, list[float]] = {v: [] for v in variants}
    counts = {v: Statistics() for v in variants}
    made: dict[str, list[list[int]]] = {}
    for v, settings in variants.items():  # compiles, and gives the tokens
        made[v] = [decode(model, p, args.new, **settings)[0] for p in prompts]
    for _ in range(args.rounds):
        for p in prompts:
            for v, settings in variants.items():
                more = settings | ({"statistics": counts[v]} if settings else {})
                rates[v].append((args.new - 1) / decode(model, p, args.new, **more)[1])
    one = step_seconds(model, prompts[0], 1, room(args.prompt, args.new, 1 << 30, None), False)
    rows: list[dict[str, Any]] = []
    for v in variants:
        rate = statistics.median(rates[v])
        row: dict[str, Any] = {"variant": v, "tok_s": rate, "lowest": min(rates[v]), "highest": max(rates[v])}
        if v != "plain":
            shape, c = Speculation.parse(v), counts[v]
            nodes = shape.nodes(shape.levels)
            capacity = room(args.prompt, args.new, 1 << 30, None, nodes + shape.level_width(shape.levels))
            tree = shape.shape != "chain"
            parts = [one, step_seconds(model, prompts[0], nodes, capacity, tree), step_seconds(small, prompts[0], 1, capacity, False)]
            plain_s, judge_s, draft_s = (statistics.median(p() for _ in range(3)) for p in parts)
            row |= {
                "gain": rate / statistics.median(rates["plain"]), "tokens_per_round": c.tokens_per_round, "acceptance": c.acceptance,
                "drafts_per_round": c.draft_forwards / c.rounds, "plain_step_ms": 1e3 * plain_s, "judge_ms": 1e3 * judge_s, "draft_ms": 1e3 * draft_s,
                "predicted": c.tokens_per_round * plain_s / (judge_s + c.draft_forwards / c.rounds * draft_s),
                "same": sum(same(a, b) for a, b in zip(made[v], made["plain"], strict=True)) / (args.new * len(prompts)),
            }  # fmt: skip
        rows.append(row)
    packed = sum(w.nbytes for w in packed_weights(model).values())
    save(args.name, rows, threads=args.threads, target=args.target, draft=args.draft, new=args.new, prompt=args.prompt, prompts=args.prompts,
         target_bytes=packed or sum(p.numel() * p.element_size() for p in model.parameters()), draft_extra_bytes=extra_bytes(model, small))  # fmt: skip


if __name__ == "__main__":
    main()
