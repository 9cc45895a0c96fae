"""What masked training gives back of an N:M demo model: perplexity before and after some hundred steps of `effllm.recover`.

    python benchmarks/nm_recovery.py [--recipes "nm(pattern=2:4, solver=wanda);armor(pattern=2:4, block=64)"] [--steps 300] [--lr 0.003]
                                     [--what factors] [--texts WHEEL]

The model is compressed through `effllm.compress`, then the kept values of the packed weights (and ARMOR's wrappers) are trained in their packed
form, so that the pattern cannot change; teacher is the dense model. Loss: KL of the logits plus SquareHead on some block outputs. A step reads
`batch` windows of 256 tokens of even articles, every window is read once; odd articles are scored in windows of 512. gap_left: log(after / dense) over
log(before / dense). Results stay in benchmarks/results/nm_recovery.json.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import effllm
from effllm.autotune.machine import describe
from effllm.hf import texts
from effllm.hf.demo import load_demo
from effllm.hf.evaluate import perplexity
from effllm.runtime.formats import nm
from effllm.runtime.formats.parts import part
from effllm.runtime.weights import ArmorWeight, NMWeight

RESULTS = Path(__file__).parent / "results" / "nm_recovery.json"
RECIPES = "nm(pattern=2:4, solver=wanda);nm(pattern=2:4, solver=sparsegpt);armor(pattern=2:4, block=64)"
_WINDOW = 256  # tokens of a recovery window
_KEYS = ("recipe", "steps", "what", "lr", "features", "kl", "lm")


def masks(model: torch.nn.Module) -> dict[str, Tensor]:
    """Mask of every N:M weight, by module name."""
    held = {n: m.packed() for n, m in model.named_modules() if isinstance(m, NMWeight | ArmorWeight)}
    return {n: nm.mask(part(p, "core") if p.format == "armor" else p) for n, p in held.items()}


def row(recipe: str, a: argparse.Namespace, calibration: Tensor, training: Tensor, windows: Tensor) -> dict[str, Any]:
    """Compress, score, recover, score."""
    dense, _ = load_demo(torch.bfloat16)
    model, _ = load_demo(torch.bfloat16)
    base = perplexity(dense, windows)
    start = time.perf_counter()
    effllm.compress(model, recipe, calibration)
    packed = time.perf_counter() - start
    before, patterns = perplexity(model, windows), masks(model)
    print(f"{recipe}: dense {base:.2f}, compressed {before:.2f} ({before / base:.3f}x) in {packed:.0f} s", flush=True)

    def progress(done: int, total: int, text: str) -> None:
        if done % 10 == 0:
            print(f"  {done}/{total} {text} {time.perf_counter() - start - packed:.0f} s", flush=True)

    what = a.what.split(",") if "*" in a.what else a.what
    loss = {"kl": a.kl, "lm": a.lm, "features": a.features}
    keep = {"checkpoint": a.checkpoint, "every": 25, "resume": True} if a.checkpoint else {}
    done = effllm.recover(model, dense, training, a.steps, what=what, batch=a.batch, lr=a.lr, loss=loss, features=a.blocks, progress=progress, **keep)
    after = perplexity(model, windows)
    left = math.log(after / base) / math.log(before / base)
    for name, mask in masks(model).items():
        assert torch.equal(mask, patterns[name]), f"{name}: its mask moved"
    print(f"{recipe}: after {a.steps} steps {after:.2f} ({after / base:.3f}x), {left:.3f} of the log gap left, {done.seconds:.0f} s", flush=True)
    found = {"recipe": recipe, "dense": base, "ratio": before / base, "compress_s": packed, "steps": a.steps, "what": a.what, "lr": a.lr, **loss}
    found |= {"blocks": a.blocks, "recovered": after / base, "gap_left": left, "recover_s": done.seconds, "trained": done.trained, "tokens": done.tokens}
    return found | {"tokens_per_step": a.batch * _WINDOW, "calibration_tokens": calibration.numel(), "scored_tokens": windows.numel()}


def main() -> None:
    """Run the chosen rows and merge them into the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default=RECIPES, help="separated by semicolons")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--what", default="factors", help='as for `recover`; globs with commas between them, such as "*.values,*norm*"')
    parser.add_argument("--lr", type=float, default=3e-3, help="relative to each tensor's root mean square")
    parser.add_argument("--kl", type=float, default=1.0)
    parser.add_argument("--lm", type=float, default=0.0)
    parser.add_argument("--features", type=float, default=1.0, help="weight of SquareHead")
    parser.add_argument("--blocks", type=int, default=4, help="blocks whose outputs are matched")
    parser.add_argument("--batch", type=int, default=1, help="windows of 256 tokens in a step")
    parser.add_argument("--checkpoint", metavar="DIR", help="where the state of one recipe's recovery is kept, to go on from after an interruption")
    parser.add_argument("--calibration", type=int, default=16)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--texts", metavar="WHEEL")
    a = parser.parse_args()
    _, tokenizer = load_demo(torch.bfloat16)
    read = texts.calibration_text(a.texts).text
    calibration = texts.windows(tokenizer, read, 512, a.calibration)
    training = texts.windows(tokenizer, read, _WINDOW, a.batch * a.steps)
    windows = texts.windows(tokenizer, texts.evaluation_text(a.texts).text, 512, a.windows)
    data = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"rows": []}
    for recipe in a.recipes.split(";"):
        made = row(recipe.strip(), a, calibration, training, windows)
        data["rows"] = [r for r in data["rows"] if any(r.get(k) != made[k] for k in _KEYS)] + [made]
        data["machine"] = describe()
        RESULTS.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
