"""Perplexity of the demo model under structured recipes, before and after recovery steps, through effllm.compress and effllm.recover.

    python benchmarks/structured_recovery.py [--recipes "whitened(ratio=0.9);whitened(ratio=0.8)"] [--steps 300] [--calibration 16] [--windows 16]
                                             [--texts WHEEL]

Calibration and recovery read even articles, evaluation odd ones, windows of 512 tokens; heads and embeddings stay dense. Results stay in
benchmarks/results/structured-recovery.json.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

import effllm
from effllm.autotune.machine import describe
from effllm.hf import texts
from effllm.hf.demo import load_demo
from effllm.hf.evaluate import perplexity

RESULTS = Path(__file__).parent / "results" / "structured-recovery.json"
RECIPES = "whitened(ratio=0.9);whitened(ratio=0.8)"
_WINDOW = 256  # tokens of a recovery window


def row(recipe: str, steps: int, calibration: torch.Tensor, training: torch.Tensor, windows: torch.Tensor) -> dict[str, Any]:
    """Compress, score, recover, score."""
    dense, _ = load_demo(torch.bfloat16)
    model, _ = load_demo(torch.bfloat16)
    base = perplexity(dense, windows)
    start = time.perf_counter()
    report = effllm.compress(model, recipe, calibration)
    packed = time.perf_counter() - start
    before = perplexity(model, windows)
    saved = sum(d.bytes_before - d.bytes_after for d in report.decisions)
    found: dict[str, Any] = {"recipe": recipe, "dense": base, "ratio": before / base, "compress_s": packed, "bytes_saved": saved}
    print(f"{recipe}: dense {base:.2f}, compressed {before:.2f} ({before / base:.3f}x) in {packed:.0f} s", flush=True)
    if steps:

        def progress(done: int, total: int, text: str) -> None:
            if done % 25 == 0:
                print(f"  {done}/{total} {text} {time.perf_counter() - start - packed:.0f} s", flush=True)

        done = effllm.recover(model, dense, training, steps, progress=progress)
        after = perplexity(model, windows)
        left = math.log(after / base) / math.log(before / base)
        found |= {"steps": steps, "recovered": after / base, "gap_left": left, "recover_s": done.seconds}
        print(f"{recipe}: after {steps} steps {after:.2f} ({after / base:.3f}x), {left:.2f} of the log gap left, {done.seconds:.0f} s", flush=True)
    return found


def main() -> None:
    """Run the chosen rows and merge them into the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default=RECIPES, help="separated by semicolons")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--calibration", type=int, default=16)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--texts")
    args = parser.parse_args()
    _, tokenizer = load_demo(torch.bfloat16)
    read = texts.calibration_text(args.texts).text
    calibration = texts.windows(tokenizer, read, 512, args.calibration)
    training = texts.windows(tokenizer, read, _WINDOW, 2 * args.steps)
    windows = texts.windows(tokenizer, texts.evaluation_text(args.texts).text, 512, args.windows)
    data = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"rows": []}
    for recipe in args.recipes.split(";"):
        made = row(recipe.strip(), args.steps, calibration, training, windows)
        data["rows"] = [r for r in data["rows"] if (r["recipe"], r.get("steps", 0)) != (made["recipe"], made.get("steps", 0))] + [made]
        data["machine"] = describe()
        RESULTS.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
