"""Caches over a session: several questions on one context, asked one behind the other or each from the same cache (effllm.hf.lifecycle).

    python -m benchmarks.kv_lifecycle [--model induction|demo] [--length 2048] [--sessions 4] [--turns 4] [--only kivi-4,ems-256] [--threads 1]

`induction` is the hand-built model that only retrieves, so that a dense cache is always right; `demo` reads plain English and is not. Rows go to
benchmarks/results/kv_lifecycle.json as they are made; rows of other runs stay there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from effllm.autotune.machine import describe
from effllm.hf.cache import CompressedCache
from effllm.hf.demo import load_demo
from effllm.hf.induction import induction_model
from effllm.hf.kv_calibrate import collect, sort_tables, weighted_tables
from effllm.hf.kv_evict import EvictingCache
from effllm.hf.lifecycle import Session, run
from effllm.hf.lifecycle_tasks import TASKS, text_sessions, token_sessions
from effllm.runtime.caches.ems import Ems

RESULTS = Path(__file__).parent / "results" / "kv_lifecycle.json"
SPECS = {
    "dense": "dense", "kivi-4": "kivi(bits=4)", "kivi-2": "kivi(bits=2)", "gear-4": "gear(bits=4)", "gear-2": "gear(bits=2,factors=8)",
    "mustafar-50": "mustafar(sparsity=0.5,page=64)", "mustafar-70": "mustafar(sparsity=0.7,page=64)", "bfp-4": "bfp(bits=4,vbits=4)",
    "bfp-4-sorted": "bfp(bits=4,vbits=4)", "matryoshka-50": "matryoshka(k=0.5,v=0.5)",
}  # fmt: skip
BUDGETS = (128, 256, 512)


def caches(model: Any, calibration: list[torch.Tensor]) -> dict[str, Callable[[], Any]]:
    """Empty caches by name; statistics are of other sessions, gathered where a cache needs them."""

    @lru_cache
    def tables(name: str) -> dict[int, list[torch.Tensor]] | None:
        if name not in ("bfp-4-sorted", "matryoshka-50"):
            return None
        with torch.no_grad():
            states = collect(model, calibration)
            return sort_tables(states, values=True) if name == "bfp-4-sorted" else weighted_tables(states)

    made: dict[str, Callable[[], Any]] = {n: lambda n=n, s=s: CompressedCache(model, s, tables=tables(n)) for n, s in SPECS.items()}  # type: ignore[misc]
    return made | {f"ems-{b}": lambda b=b: EvictingCache(model, Ems(budget=b)) for b in BUDGETS}  # type: ignore[misc]


def sessions(name: str, tokenizer: Any, length: int, count: int, turns: int, seed: int) -> list[Session]:
    """Of all tasks."""
    if tokenizer is None:
        return [s for t in TASKS for s in token_sessions(t, length, count, turns, seed=seed)]
    return [s for t in TASKS for s in text_sessions(tokenizer, t, length, count, turns, seed)]


def main() -> None:
    """Run, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("induction", "demo"), default="induction")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--sessions", type=int, default=4)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--only", default="")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_demo(torch.float32) if args.model == "demo" else (induction_model(), None)
    known = caches(model, [s.context for s in sessions(args.model, tokenizer, args.length, 1, args.turns, 1000)])
    asked = sessions(args.model, tokenizer, args.length, args.sessions, args.turns, 0)
    rows = {(r["model"], r["length"], r["cache"], r["task"]): r for r in (json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else [])}
    for name in [n for n in args.only.split(",") if n] or list(known):
        start = time.perf_counter()
        for row in run(model, asked, known[name], known["dense"]):
            of = {"model": args.model, "length": args.length, "cache": name, "sessions": args.sessions, "turns": args.turns}
            rows[args.model, args.length, name, row.task] = of | asdict(row)
            print(f"{name:14} {row.task:14} first {row.first:.2f} later {row.later:.2f} requests {row.requests:.2f} kl {row.kl:.2e} "
                  f"{row.bytes_per_token:.0f} bytes {'' if row.isolated else 'LEAKS '}{'' if row.reloaded else 'LOST IN FILE'}", flush=True)  # fmt: skip
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        RESULTS.write_text(json.dumps({"machine": describe(), "rows": list(rows.values())}, indent=1) + "\n")


if __name__ == "__main__":
    main()
