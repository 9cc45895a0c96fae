"""Perplexity of the demo model under structured recipes, before and after recovery steps, through effllm.compress and effllm.recover.

    python benchmarks/structured_recovery.py [--rows whitened,monarch,...] [--ratios 0.9,0.8] [--steps 300] [--batch 3] [--calibration 16] [--windows 16]
                                             [--refit 0] [--length 256] [--texts WHEEL] [--targets DIR] [--table]

Calibration (windows of 512 tokens) and recovery (`batch` windows of `length` tokens a step, each read once) use even articles, evaluation odd
ones; heads and embeddings stay dense. Both are spread evenly over their text. Models are bf16, or fp32 where the processor has no bf16 products. The
teacher's answers are computed once for all rows and kept in DIR where one is given. Rows are written to
benchmarks/results/structured-recovery.json as they come, first without recovery; --steps 0 leaves it there. --refit N fits low-rank factors in closed
form on N windows before the steps, and scores that alone too. Rows that are there already are not measured again. --table prints what is there and
measures nothing.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import effllm
from effllm import compat
from effllm.autotune.machine import describe
from effllm.errors import CheckpointError
from effllm.hf import texts
from effllm.hf.demo import load_demo
from effllm.hf.evaluate import perplexity
from effllm.recovery.pivoted import plain_forms
from effllm.recovery.refit import refit
from effllm.recovery.targets import Targets, cache_targets, load_targets

RESULTS = Path(__file__).parent / "results" / "structured-recovery.json"
DTYPE = torch.bfloat16 if compat.fast_bf16(torch.device("cpu")) else torch.float32  # bf16 would take eight times as long
Row = dict[str, Any]
PLAIN = "allocation=uniform, pivoted=false"
ROWS: dict[str, str] = {  # recipes without their ratio, as published unless named otherwise
    "whitened": "whitened()",
    "whitened, uniform ranks": f"whitened({PLAIN}, metric=plain)",
    "afm": f"afm({PLAIN}, metric=plain)",
    "asvd": f"asvd({PLAIN})",
    "fwsvd": f"fwsvd({PLAIN})",
    "svd": f"svd({PLAIN})",
    "monarch, plain": "monarch(solver=project)",
    "monarch, whitened": "monarch(solver=whitened)",
    "monarch, descent": "monarch(solver=descent)",
    "sltrain": "sltrain()",
    "lost": "lost()",
}


def recipe_of(row: str, ratio: float) -> str:
    """The recipe of a row with its ratio."""
    name, _, rest = ROWS[row].partition("(")
    return f"{name}(ratio={ratio:g}{', ' if rest != ')' else ''}{rest}"


def label(row: str, refit: int) -> str:
    """What a row is stored as: with a closed-form fit it is another one."""
    return f"{row}, refit" if refit else row


def stored() -> list[Row]:
    """The rows measured so far."""
    return json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []


def keep(new: Row) -> None:
    """Put a row in the place of the older one of its settings; several runs may write at once."""
    with RESULTS.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = [r for r in stored() if (r["row"], r["share"]) != (new["row"], new["share"])] + [new | {"machine": describe()}]
        RESULTS.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


def _spread(windows: torch.Tensor, count: int) -> torch.Tensor:
    """So many of them, evenly spaced; all where there are no more."""
    return windows[:: max(1, len(windows) // max(1, count))][:count]


class Run:
    """The texts, the dense model and its answers; measures one row after another."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.dense, tokenizer = load_demo(DTYPE)
        everything = texts.calibration_text(args.texts)
        evaluation = texts.evaluation_text(args.texts)
        self.calibration = _spread(texts.windows(tokenizer, everything.text, 512), args.calibration)
        self.windows = texts.windows(tokenizer, evaluation.text, 512, args.windows)
        whole = texts.windows(tokenizer, everything.text, args.length)
        self.training, self.fitting = _spread(whole, max(1, args.steps * args.batch)), _spread(whole, args.refit)
        self.base = perplexity(self.dense, self.windows)
        self.text = evaluation.name
        self._targets: Targets | None = None
        print(f"dense {self.base:.3f} on {self.text}, {self.windows.shape[0] * 511} targets", flush=True)

    def targets(self) -> Targets:
        """The dense model's answers to the training text."""
        if self._targets is None:
            folder = self.args.targets
            try:
                self._targets = load_targets(folder)
            except (CheckpointError, TypeError):
                self._targets = cache_targets(self.dense, self.training, directory=folder)
        return self._targets

    def measure(self, row: str, share: float) -> None:
        """Compress, score, recover, score; stored after each score."""
        recipe, args = recipe_of(row, share), self.args
        model, _ = load_demo(DTYPE)
        start = time.perf_counter()
        report = effllm.compress(model, recipe, None if row == "svd" or "project" in recipe else self.calibration)
        packed = time.perf_counter() - start
        before = perplexity(model, self.windows)
        covered = [d for d in report.decisions if d.bytes_before]
        sizes = [sum(getattr(d, f"bytes_{when}") for d in covered if ".layers." in d.module) for when in ("before", "after")]
        found: Row = {"row": label(row, args.refit), "share": share, "recipe": recipe, "text": self.text, "dtype": str(DTYPE).removeprefix("torch.")}
        found |= {"dense": self.base, "perplexity": before, "ratio": before / self.base}
        found |= {"stored": sizes[1] / max(1, sizes[0]), "bytes_saved": sizes[0] - sizes[1], "compress_s": packed}
        found["calibration_tokens"] = self.calibration.numel()
        keep(found)
        print(f"{recipe}: {before:.2f} ({before / self.base:.4g}x), {found['stored']:.4f} stored, {packed:.0f} s", flush=True)
        if args.refit:
            found |= self._refit(model, recipe, before)
            keep(found)
        if not args.steps:
            return
        done = effllm.recover(model, self.targets(), self.training, args.steps, batch=args.batch, lr=args.lr, progress=self._progress(start + packed))
        after = perplexity(model, self.windows)
        left = math.log(after / self.base) / math.log(before / self.base)
        found |= {"steps": args.steps, "lr": args.lr, "tokens": args.steps * args.batch * args.length, "recovered": after / self.base, "gap_left": left}
        found["recover_s"] = done.seconds
        keep(found)
        print(f"{recipe}: after {args.steps} steps {after:.2f} ({after / self.base:.4g}x), {left:.2f} of the log gap left, {done.seconds:.0f} s", flush=True)

    def _refit(self, model: torch.nn.Module, recipe: str, before: float) -> Row:
        start = time.process_time()
        with plain_forms(model):
            refit(model, self.dense, list(self.fitting.split(1)), progress=self._progress(time.perf_counter()))
        seconds, after = time.process_time() - start, perplexity(model, self.windows)
        left = math.log(after / self.base) / math.log(before / self.base)
        tokens = self.fitting.numel()
        print(f"{recipe}: closed form on {tokens} tokens {after:.2f} ({after / self.base:.4g}x), {left:.2f} left, {seconds:.0f} s of CPU", flush=True)
        return {"refit_tokens": tokens, "refitted": after / self.base, "refit_gap_left": left, "refit_cpu_s": seconds}

    @staticmethod
    def _progress(start: float) -> Callable[[int, int, str], None]:
        def show(done: int, total: int, text: str) -> None:
            if done % 25 == 0:
                print(f"  {done}/{total} {text} {time.perf_counter() - start:.0f} s", flush=True)

        return show


def table() -> str:
    """The rows as Markdown."""

    def times(value: float) -> str:
        return f"{value:.3f}x" if value < 100 else f"{value:.1e}x".replace("e+0", "e").replace("e+", "e")

    shares = sorted({r["share"] for r in stored()}, reverse=True)
    head = [f"{1 - s:.0%} removed{after}" for s in shares for after in ("", f", {_steps(s)} steps")]
    lines = ["| row | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for row in (label(name, fitted) for name in ROWS for fitted in (0, 1)):
        cells = []
        for share in shares:
            found = next((r for r in stored() if (r["row"], r["share"]) == (row, share)), None)
            cells += ["" if found is None else times(found.get("refitted", found["ratio"]))]
            cells += ["" if found is None or "recovered" not in found else f"{times(found['recovered'])} ({found['gap_left']:.2f})"]
        if any(cells):
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _steps(share: float) -> int:
    return max((r.get("steps", 0) for r in stored() if r["share"] == share), default=0)


def main() -> None:
    """Run the chosen rows and merge them into the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=";".join(ROWS), help="names separated by semicolons")
    parser.add_argument("--ratios", default="0.9,0.8", help="shares of the numbers that stay")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, help="default: that of recover")
    parser.add_argument("--batch", type=int, default=3, help="windows of a step")
    parser.add_argument("--refit", type=int, default=0, help="windows of the closed-form fit")
    parser.add_argument("--length", type=int, default=256, help="tokens of a recovery window")
    parser.add_argument("--calibration", type=int, default=16)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--texts", metavar="WHEEL")
    parser.add_argument("--targets", type=Path, metavar="DIR")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        print(table())
        return
    run: Run | None = None
    for row in (name.strip() for name in args.rows.split(";")):
        for share in (float(s) for s in args.ratios.split(",")):
            known = next((r for r in stored() if (r["row"], r["share"]) == (label(row, args.refit), share)), None)
            wanted = {"tokens": args.steps * args.batch * args.length, "refit_tokens": args.refit * args.length}
            if known is not None and all(known.get(key, 0) >= count for key, count in wanted.items()):
                continue
            run = run or Run(args)
            run.measure(row, share)


if __name__ == "__main__":
    main()
