"""Bases of a Matryoshka cache for the demo model: principal axes, and the same trained by distillation.

    python -m benchmarks.kv_basis --out TABLES.safetensors [--texts WHEEL] [--steps 150] [--kl 1.0]

Calibration and training read even articles, in windows of --length tokens: --prompt are the prompt, of which all but the last 64 are projected.
The file holds `pca.LAYER.i` and `trained.LAYER.i`; benchmarks/kv_more.py reads it.
"""

from __future__ import annotations

import argparse
import time

import torch
from safetensors.torch import save_file

from effllm.hf import texts
from effllm.hf.demo import load_demo
from effllm.hf.kv_basis import BasisTraining, train_basis
from effllm.hf.kv_calibrate import collect, pca_tables


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
    args = parser.parse_args()
    model, tokenizer = load_demo(torch.float32)
    text = texts.calibration_text(args.texts)
    windows = list(texts.windows(tokenizer, text.text, args.length, args.windows))
    pca = pca_tables(collect(model, windows[: args.calibrate]))
    start, losses = time.perf_counter(), []

    def report(step: int, loss: float) -> None:
        losses.append(loss)
        if step % 5 == 4:
            print(f"step {step + 1}: {sum(losses[-5:]) / 5:.4f}  {time.perf_counter() - start:.0f} s", flush=True)

    how = BasisTraining(steps=args.steps, kl=args.kl, rate=args.rate, high=args.high, prompt=args.prompt)
    trained = train_basis(model, windows, pca, how, report)
    named = [(f"{name}.{layer}.{i}", t) for name, part in (("pca", pca), ("trained", trained)) for layer, ts in part.items() for i, t in enumerate(ts)]
    flat = {name: t.contiguous() for name, t in named}
    save_file(flat, args.out, {"text": text.name, "how": repr(how)})


if __name__ == "__main__":
    main()
