"""What N:M solvers gain on their calibration inputs, and how much of it is left on other inputs of the same layers.

    python benchmarks/nm_holdout.py [--texts WHEEL] [--patterns 6:8,2:4] [--tokens 8192,32768] [--layers 2,14,27]

Inputs of the dense demo model: statistics of the first windows of 512 tokens of even articles are what solvers see; as many windows of odd
articles are what they are judged on. Figures are the squared output error relative to the zero matrix, mean over all linears of the layers:
`seen` on the calibration inputs, `fresh` on the others. DSnoT is shown beside Wanda's mask that it starts from, with and without its guard;
`worse rows` is the share of rows whose error on the calibration inputs grew. Results go to benchmarks/results/nm_holdout.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effllm.autotune.machine import describe
from effllm.hf import texts
from effllm.hf.demo import load_demo
from effllm.solvers import blocks
from effllm.solvers import nm as solvers
from effllm.solvers.moments import Moments
from effllm.solvers.nm.masks import row_loss
from effllm.solvers.statistics import Statistics

RESULTS = Path(__file__).parent / "results" / "nm_holdout.json"
Solver = Callable[[Tensor, Moments, int, int], Tensor]


def _dsnot(guard: bool) -> Solver:
    def solve(w: Tensor, x: Moments, n: int, m: int) -> Tensor:
        score = solvers.wanda(w, x)
        return w * solvers.dsnot(w, x, solvers.nm_mask(score, n, m), score, pattern=(n, m), guard=guard)

    return solve


def _sparsegpt(damp: float, sort: bool = False) -> Solver:
    return lambda w, x, n, m: solvers.sparsegpt(w, x, n, m, damp=damp, sort=sort).weight


TABLE: dict[str, Solver] = {
    "wanda": lambda w, x, n, m: w * solvers.nm_mask(solvers.wanda(w, x), n, m),
    "dsnot": _dsnot(True), "dsnot-unguarded": _dsnot(False),
    "sparsegpt damp 0.01": _sparsegpt(0.01), "sparsegpt damp 0.1": _sparsegpt(0.1), "sparsegpt damp 1": _sparsegpt(1.0),
    "sparsegpt sorted damp 0.01": _sparsegpt(0.01, sort=True),
}  # fmt: skip


@torch.no_grad()
def moments(model: nn.Module, linears: dict[str, nn.Module], windows: Tensor) -> dict[str, Moments]:
    """Second moments of the linears' inputs."""
    with Statistics(linears) as statistics:
        for batch in blocks.batches(windows):
            statistics.begin()
            blocks.run(model, batch)
    found = {n: statistics.moments(n) for n in linears}
    return {n: x for n, x in found.items() if x is not None}


def relative(w: Tensor, q: Tensor, x: Moments) -> float:
    """Squared output error relative to that of the zero matrix."""
    return float(row_loss(w, q, x.hessian).sum() / row_loss(w, torch.zeros_like(w), x.hessian).sum())


def main() -> None:
    """Print each row and keep them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", metavar="WHEEL")
    parser.add_argument("--patterns", default="6:8,2:4")
    parser.add_argument("--tokens", default="8192,32768")
    parser.add_argument("--layers", default="2,14,27")
    parser.add_argument("--methods", default=",".join(TABLE))
    a = parser.parse_args()
    model, tokenizer = load_demo(torch.float32)
    layers = [f"model.layers.{i}." for i in a.layers.split(",")]
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and any(n.startswith(p) for p in layers)}
    fresh = moments(model, linears, texts.windows(tokenizer, texts.evaluation_text(a.texts).text, 512, 16))
    rows: list[dict[str, Any]] = []
    for tokens in map(int, a.tokens.split(",")):
        seen = moments(model, linears, texts.windows(tokenizer, texts.calibration_text(a.texts).text, 512, tokens // 512))
        for pattern in a.patterns.split(","):
            n, m = map(int, pattern.split(":"))
            for method in a.methods.split(","):
                found = []
                for name, module in linears.items():
                    w = module.get_parameter("weight").detach()
                    q, base = TABLE[method](w, seen[name], n, m), TABLE["wanda"](w, seen[name], n, m)
                    h = seen[name].hessian
                    worse = float((row_loss(w, q, h) > row_loss(w, base, h)).double().mean())
                    found.append((relative(w, q, seen[name]), relative(w, q, fresh[name]), worse))
                mean = [sum(column) / len(found) for column in zip(*found, strict=True)]
                row = {"pattern": pattern, "tokens": tokens, "method": method, "seen": mean[0], "fresh": mean[1], "worse_rows": mean[2]}
                print("  ".join(f"{k}={v:.5f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
                rows.append(row)
    RESULTS.write_text(json.dumps({"machine": describe(), "layers": a.layers, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
