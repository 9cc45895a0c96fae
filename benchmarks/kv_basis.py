"""Bases of a Matryoshka cache for the demo model: principal axes, axes weighted by attention, and one of the two trained by distillation (--start).

    python -m benchmarks.kv_basis --out TABLES.safetensors [--texts WHEEL] [--steps 150] [--kl 1.0]

Calibration and training read even articles, in windows of --length tokens: --prompt are the prompt, of which all but the last 64 are projected.
Everything runs on the model in bfloat16. The file holds `pca.LAYER.i`, `weighted.LAYER.i` and `trained.LAYER.i`; benchmarks/kv_quality.py reads it.
"""

from __future__ import annotations

import argparse
import time

import torch
from safetensors.torch import save_file

from benchmarks.kv_calibrated import read_basis
from effllm.hf import texts
from effllm.hf.demo import load_demo
from effllm.hf.kv_basis import BasisTraining, train_basis
from effllm.hf.kv_calibrate import collect, pca_tables, weighted_tables


def main() -> None:
    """Calibrate, train, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--texts")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--kl", type=float, default=1.0)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--length", type=int, default=768)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--calibrate", type=int, default=16)
    parser.add_argument("--high", type=float, default=0.75)
    parser.add_argument("--low", type=float, default=0.25)
    parser.add_argument("--tables", help="a file of an earlier run, to take bases without training from")
    parser.add_argument("--start", choices=("pca", "weighted"), default="pca")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_demo(torch.bfloat16)
    text = texts.calibration_text(args.texts)
    windows = list(texts.windows(tokenizer, text.text, args.length, args.windows))
    start, losses = time.perf_counter(), []
    if args.tables:
        bases = {name: read_basis(args.tables, name) for name in ("pca", "weighted")}
    else:
        states = collect(model, windows[: args.calibrate])
        print(f"statistics: {time.perf_counter() - start:.0f} s", flush=True)
        bases = {"pca": pca_tables(states), "weighted": weighted_tables(states)}
        print(f"weighted: {time.perf_counter() - start:.0f} s", flush=True)
    write(args.out, bases, {"text": text.name, "how": "not trained"})

    def report(step: int, loss: float) -> None:
        losses.append(loss)
        if step % 5 == 4:
            print(f"step {step + 1}: {sum(losses[-5:]) / 5:.4f}  {time.perf_counter() - start:.0f} s", flush=True)

    how = BasisTraining(steps=args.steps, kl=args.kl, rate=args.rate, low=args.low, high=args.high, prompt=args.prompt)
    bases["trained"] = train_basis(model, windows, bases[args.start], how, report)
    write(args.out, bases, {"text": text.name, "how": repr(how), "start": args.start})


def write(path: str, bases: dict[str, dict[int, list[torch.Tensor]]], about: dict[str, str]) -> None:
    """NAME.LAYER.i for every table; copies, since bases share their means."""
    held = {f"{name}.{layer}.{i}": t.clone().contiguous() for name, part in bases.items() for layer, ts in part.items() for i, t in enumerate(ts)}
    save_file(held, path, about)


if __name__ == "__main__":
    main()
