"""What activation sparsity costs the demo model: perplexity (as a ratio to dense) and KL, with every token of the text made sparse.

    python benchmarks/activation_quality.py [--texts WHEEL] [--windows 16] [--methods "teal(sparsity=0.5),..."]

Thresholds are found on 16384 tokens of even articles, odd articles are scored in windows of 512, all rows sparse, the first tokens too
(decoding alone would start from a dense prompt). `realised` is the share of the calibrated activations at or below their threshold on the
scored text, weighted by the weights they skip and with the first 1 % of each window left out; `target` the same by the plan; `skipped` the
share of all weights of the layers' linears that a token does not read, low-rank factors counted as read. Weights stay fp32.
Results go to benchmarks/results/activation_quality.json, rows of other runs stay there.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from effllm.activation.apply import every_row, install
from effllm.activation.calibrate import Recording, parse
from effllm.activation.record import SINKS
from effllm.autotune.machine import describe
from effllm.hf import texts
from effllm.hf.demo import load_demo
from effllm.hf.evaluate import compare, perplexity
from effllm.recipe import _split
from effllm.runtime.activated import ThresholdedActivation
from effllm.runtime.packed import PackedLinear
from effllm.runtime.weights.thresholded import ThresholdedWeight
from effllm.solvers import blocks

RESULTS = Path(__file__).parent / "results" / "activation_quality.json"
METHODS = (
    "teal(sparsity=0.4,allocation=uniform)", "teal(sparsity=0.5,allocation=uniform)", "teal(sparsity=0.4)", "teal(sparsity=0.5)",
    "teal(sparsity=0.5,allocation=greedy)", "cats(sparsity=0.5)", "chess(sparsity=0.5,attention=false)", "chess(sparsity=0.5)",
    "cats(sparsity=0.7)", "chess(sparsity=0.7,attention=false)",
    "rsparse(sparsity=0.5,allocation=uniform)", "rsparse(sparsity=0.5,allocation=greedy)", "rsparse(sparsity=0.5)",
)  # fmt: skip


class Cached(nn.Module):
    """The dense model's logits on the scored windows, kept in fp16."""

    def __init__(self, model: nn.Module, windows: Tensor) -> None:
        super().__init__()
        with torch.no_grad():
            self.known = {tuple(w.tolist()): model(input_ids=w[None], use_cache=False).logits.half() for w in windows}

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.known[tuple(input_ids[0].tolist())])


@contextmanager
def counting(model: nn.Module, sinks: bool = True) -> Iterator[list[tuple[float, int]]]:
    """(share dropped, weights it stands for) of each sparse call, and (0, 0) of each call of the model; without the first 1 % of the tokens unless
    `sinks` is false."""
    seen: list[tuple[float, int]] = []
    handles = [model.register_forward_pre_hook(lambda _, __: seen.append((0.0, 0)))]

    def linear(module: PackedLinear, args: Any) -> None:
        w = module.weight
        assert isinstance(w, ThresholdedWeight)
        x = late(args[0]) if sinks else args[0]
        norm = getattr(w, "colnorm", None)
        size = x.abs().float() * (1 if norm is None else norm)
        if bool((w.threshold > 0).any()):  # a threshold of 0 skips what a gate dropped, counted there
            seen.append((float((size <= w.threshold).float().mean()), w.shape[0] * w.shape[1]))

    def gate(module: nn.Module, _: Any, y: Tensor) -> None:
        seen.append((float(((late(y) if sinks else y) == 0).float().mean()), y.shape[-1] * 2 * model.config.hidden_size))  # rows of up, columns of down

    for module in model.modules():
        if isinstance(module, PackedLinear) and isinstance(module.weight, ThresholdedWeight) and module.weight.attrs["side"] == "in":
            handles.append(module.register_forward_pre_hook(linear))  # type: ignore[arg-type]
        elif isinstance(module, ThresholdedActivation):
            handles.append(module.register_forward_hook(gate))
    try:
        yield seen
    finally:
        for h in handles:
            h.remove()


def late(x: Tensor) -> Tensor:
    return x[..., math.ceil(SINKS * x.shape[-2]) :, :]


def rows(a: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure the methods that are asked for."""
    model, tokenizer = load_demo(torch.float32)
    source = texts.evaluation_text(a.texts)
    windows = texts.windows(tokenizer, source.text, 512, a.windows)
    calibration = texts.windows(tokenizer, texts.calibration_text(a.texts).text, 512, a.calibration)
    dense = Cached(model, windows)
    base = perplexity(dense, windows)
    words = [w.strip() for w in _split(a.methods, ",")]
    recording = Recording(model, blocks.batches(calibration), calibration.numel(), parse(words), print)
    for word in words:
        start = time.perf_counter()
        found = recording.solve(parse(word))
        seconds = time.perf_counter() - start
        plan = found.plans[0]
        _, swap = install(model, found, plan, anyway=True)
        with every_row(model), counting(model) as seen:
            figures = compare(model, dense, windows)
        swap.rollback()
        cuts = {**plan.inputs, **plan.gates}
        weights = {n: math.prod(found.sites[n].shape) * (1 if n in plan.inputs else 2) for n in cuts}
        target = sum(cuts[n].realised * weights[n] for n in cuts) / sum(weights.values())
        calls = sum(n == 0 for _, n in seen)  # sites that skip nothing count too
        realised = sum(share * n for share, n in seen) / (calls * sum(weights.values()))
        ratio = figures["perplexity"] / base
        yield {
            "method": plan.method.label, "recipe": word, **plan.method.to_dict(), "ratio": ratio, "kl": figures["kl"], "top1": figures["top1_agreement"],
            "skipped": found.level(plan), "target": target, "realised": realised, "low_rank": sum(c.alpha < 1 for c in plan.inputs.values()),
            "solve_seconds": seconds, "tokens": windows.numel(), "calibration_tokens": calibration.numel(), "dense_perplexity": base, "text": source.name,
            "allocation_by_role": by_role(found.sites, plan),
        }  # fmt: skip


def by_role(sites: Any, plan: Any) -> dict[str, float]:
    """Mean realised sparsity per role."""
    found: dict[str, list[float]] = {}
    for n, cut in plan.inputs.items():
        found.setdefault(sites[n].role, []).append(cut.realised)
    for cut in plan.gates.values():
        found.setdefault("gate channels", []).append(cut.realised)
    return {k: round(sum(v) / len(v), 3) for k, v in found.items()}


def main() -> None:
    """Print each row and keep it in the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", metavar="WHEEL")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--windows", type=int, default=16, help="windows of 512 tokens that are scored")
    parser.add_argument("--calibration", type=int, default=32, help="windows of 512 tokens that calibrate")
    parser.add_argument("--out", type=Path, default=RESULTS)
    a = parser.parse_args()
    for row in rows(a):
        kept = json.loads(a.out.read_text())["rows"] if a.out.is_file() else []  # another run may have added to it
        kept = [r for r in kept if (r["recipe"], r["tokens"]) != (row["recipe"], row["tokens"])] + [row]
        text = " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items() if k not in ("method",))
        print(text, flush=True)
        a.out.parent.mkdir(exist_ok=True)
        a.out.write_text(json.dumps({"machine": describe(), "rows": kept}, indent=1))


if __name__ == "__main__":
    main()
