"""Decoding of several sequences at once beside one: tokens of all of them a second, over those of one, for each recipe of the demo model.

    python -m benchmarks.batch [--recipes w4,w4a8,w8a8] [--batches 1,4] [--rounds 7] [--threads 2] [--out batch]

`effllm.generate(.., compile=True)`, 64 tokens behind prompts of 32 (what a run of 8 tokens takes is taken off). Recipes and batches take turns,
so that a slow minute of the machine meets all of them; a ratio is taken within its round. Prints medians and ranges, and how many of the sequences
come out as they do alone. Results go to benchmarks/results/OUT.json.
"""

from __future__ import annotations

import argparse
import copy
import re
import statistics
from typing import Any

import torch

import effllm
from benchmarks.peers import PROMPT, TOKENS, Timed, batched
from benchmarks.timing import save
from effllm.hf.demo import load_demo


def same(model: Any, count: int) -> int:
    """How many of `count` sequences, decoded together, have the tokens that each has alone."""
    prompts = [torch.arange(1000 + 7 * i, 1000 + 7 * i + PROMPT) for i in range(count)]

    def run(some: list[torch.Tensor]) -> list[torch.Tensor]:
        return effllm.generate(model, some, max_new_tokens=TOKENS, eos_token_id=-1, compile={"capacity": 256})

    return sum(torch.equal(ids, run([prompt])[0]) for ids, prompt in zip(run(prompts), prompts, strict=True))


def summary(rates: dict[tuple[str, int], list[float]], first: int) -> list[dict[str, Any]]:
    """A row for each (recipe, batch) of tokens a second by round; `ratio` is to the batch `first` of the same recipe and round."""
    rows = []
    for (recipe, count), seen in rates.items():
        ratio = [a / b for a, b in zip(seen, rates[recipe, first], strict=True)]
        row = {"recipe": recipe, "batch": count, "tok_s": statistics.median(seen), "tok_s_range": _range(seen, ".0f")}
        rows.append(row | {"ratio": statistics.median(ratio), "ratio_range": _range(ratio, ".2f")})
    return rows


def _range(values: list[float], form: str) -> str:
    return f"{min(values):{form}}..{max(values):{form}}"


def main() -> None:
    """Print a row for each recipe and batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default="w4,w4a8,w8a8")
    parser.add_argument("--batches", default="1,4", help="the first is what the others are compared to")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", default="batch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dense, _ = load_demo()
    batches = [int(b) for b in args.batches.split(",")]
    calls: dict[tuple[str, int], Timed] = {}
    alike: dict[tuple[str, int], int] = {}
    for recipe in re.split(r",(?![^(]*[)])", args.recipes):
        model = copy.deepcopy(dense)
        effllm.compress(model, recipe)
        for count in batches:
            calls[recipe, count] = batched(model, count)
            alike[recipe, count] = same(model, count)
    rates: dict[tuple[str, int], list[float]] = {case: [] for case in calls}
    for _ in range(args.rounds):
        for (recipe, count), seconds in calls.items():
            rates[recipe, count].append(TOKENS * count / seconds())
    rows = summary(rates, batches[0])
    for row in rows:
        row["same"] = alike[row["recipe"], row["batch"]]
    save(args.out, rows, threads=args.threads, rounds=args.rounds, prompt=PROMPT, tokens=TOKENS)


if __name__ == "__main__":
    main()
