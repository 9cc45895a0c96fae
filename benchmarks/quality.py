"""What fewer bits cost: perplexity of the demo model, and distance to dense of two models that were never quantized before.

    python benchmarks/quality.py [--texts WHEEL] [--whisper WHEEL] [--minilm WHEEL] [--only demo|whisper|minilm] [--calibration 48]

Demo model: windows of 512 tokens, even articles calibrate, odd ones evaluate; heads and embeddings at 8 bits; note that the model
was shipped in Q4_1, so only symmetric figures and those below 4 bits tell about the method. Whisper tiny.en: KL divergence of the
decoder's next-token distribution on forced prose; there is no speech at hand, so its encoder reads low-passed noise. MiniLM:
relative error and cosine of sentence vectors. These two stand beside plain round-to-nearest at equal bits: symmetric integers, the
scale from the group's largest weight, same groups, same modules. Results go to benchmarks/results/quality.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from models import minilm, whisper_tiny

from effllm.autotune.machine import describe
from effllm.compression import compress, plan
from effllm.hf import texts
from effllm.hf.demo import load_demo
from effllm.hf.evaluate import perplexity
from effllm.recipe import CHANNEL, Recipe
from effllm.runtime.packed import summary

RESULTS = Path(__file__).parent / "results" / "quality.json"
# recipe, calibrated, largest allowed perplexity ratio to dense
DEMO: tuple[tuple[str, bool, float | None], ...] = (
    ("w8", False, 1.005),
    ("w6", False, None),
    ("w5", False, None),
    ("w4", False, 1.005),
    ("bipolar(bits=4,group=32,offset=none)", False, None),
    ("bipolar(bits=4,group=32,offset=none)", True, 1.12),
    ("w3", False, None),
    ("w3", True, 1.6),
    ("w2", True, None),
)
BITS = (8, 6, 5, 4, 3, 2)


def demo(wheel: str | None, count: int) -> list[dict[str, Any]]:
    """Perplexity per recipe on 16 windows of 512 tokens."""
    dense, tokenizer = load_demo()
    source = texts.evaluation_text(wheel)
    windows = texts.windows(tokenizer, source.text, 512, 16)
    calibration = texts.windows(tokenizer, texts.calibration_text(wheel).text, 512, count)
    base = perplexity(dense, windows)
    rows: list[dict[str, Any]] = [{"model": "demo", "recipe": "dense", "text": source.name, "tokens": windows.numel(), "perplexity": base, "ratio": 1.0}]
    show(rows[0])
    for recipe, calibrated, limit in DEMO:
        model = copy.deepcopy(dense)
        start = time.perf_counter()
        compress(model, recipe, calibration if calibrated else None)
        seconds = time.perf_counter() - start
        value = perplexity(model, windows)
        row = {"model": "demo", "recipe": recipe, "calibration_tokens": calibration.numel() if calibrated else 0, "perplexity": value}
        row |= {"ratio": value / base, "limit": limit, "bits_per_weight": summary(model)["bits_per_weight"], "seconds": seconds}
        rows.append(row)
        show(row)
    return rows


def round_to_nearest(model: torch.nn.Module, recipe: str) -> None:
    """The peer: symmetric integers with the scale from the largest weight of each group, in the modules that the recipe covers."""
    for site in plan(model, Recipe.parse(recipe))[0]:
        weight, params = site.module.weight, site.params
        n, k = weight.shape
        group = k if params.group == CHANNEL else params.group
        x = torch.nn.functional.pad(weight.detach().float(), (0, -k % group)).view(n, -1, group)
        top = 2 ** (params.bits - 1) - 1
        scale = (x.abs().amax(-1, keepdim=True) / top).half().float().clamp_min(1e-12)
        value = ((x / scale).round().clamp(-top - 1, top) * scale).view(n, -1)[:, :k]
        with torch.no_grad():
            weight.copy_(value)


def never_quantized(name: str, dense: Any, calibration: list[Any], measure: Callable[[Any], dict[str, float]]) -> list[dict[str, Any]]:
    """Round-to-nearest, data-free and calibrated at the same bits per weight, over bit widths."""
    rows = []
    for bits in BITS:
        recipe = f"bipolar(bits={bits},group=32,offset=none)"
        for method in ("round-to-nearest", "search", "gptq"):
            model = copy.deepcopy(dense)
            start = time.perf_counter()
            if method == "round-to-nearest":
                round_to_nearest(model, recipe)
            else:
                compress(model, recipe, calibration if method == "gptq" else None)
            row = {"model": name, "recipe": recipe, "method": method, "seconds": time.perf_counter() - start, **measure(model)}
            rows.append(row)
            show(row)
    return rows


@torch.no_grad()
def whisper(wheel: str | None, prose: str | None) -> list[dict[str, Any]]:
    """Mean KL to the dense decoder, nats per token, on 12 windows of 192 tokens."""
    dense, tokenizer = whisper_tiny(wheel)
    generator = torch.Generator().manual_seed(0)

    def inputs(text: str) -> list[dict[str, Tensor]]:
        rows = texts.windows(tokenizer, text, 192, 12)
        noise = torch.randn(len(rows), 1, 80, 3000, generator=generator)
        mel = torch.nn.functional.avg_pool2d(noise, (5, 15), stride=1, padding=(2, 7))[:, 0] * 4
        return [{"input_features": m[None], "decoder_input_ids": r[None]} for m, r in zip(mel, rows, strict=True)]

    calibration, evaluation = inputs(texts.calibration_text(prose).text), inputs(texts.evaluation_text(prose).text)
    wanted = [torch.log_softmax(dense(**x, use_cache=False).logits, -1) for x in evaluation]

    def measure(model: Any) -> dict[str, float]:
        kl = same = 0.0
        for x, want in zip(evaluation, wanted, strict=True):
            got = torch.log_softmax(model(**x, use_cache=False).logits, -1)
            kl += float((want.exp() * (want - got)).sum(-1).mean()) / len(evaluation)
            same += float((want.argmax(-1) == got.argmax(-1)).float().mean()) / len(evaluation)
        return {"kl": kl, "top1_agreement": same}

    return never_quantized("whisper-tiny.en", dense, calibration, measure)


@torch.no_grad()
def sentences(wheel: str | None, prose: str | None) -> list[dict[str, Any]]:
    """Sentence vectors of 24 windows of 128 tokens: relative error, and one minus the mean cosine to dense."""
    dense, tokenizer = minilm(wheel)
    calibration = list(texts.windows(tokenizer, texts.calibration_text(prose).text, 128, 48).split(4))
    evaluation = texts.windows(tokenizer, texts.evaluation_text(prose).text, 128, 24)

    def vectors(model: Any) -> Tensor:
        return model(evaluation).last_hidden_state.mean(1)

    want = vectors(dense)

    def measure(model: Any) -> dict[str, float]:
        got = vectors(model)
        return {"relative_error": float((got - want).norm() / want.norm()), "cosine_loss": float(1 - torch.cosine_similarity(got, want).mean())}

    return never_quantized("minilm-l6", dense, calibration, measure)


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    print("  ".join(f"{k}={v:.5g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items() if v is not None), flush=True)


def main() -> None:
    """Measure what is asked for; rows of models that were left out stay in the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for key in ("texts", "whisper", "minilm"):
        parser.add_argument(f"--{key}", metavar="WHEEL")
    parser.add_argument("--only", choices=("demo", "whisper", "minilm"))
    parser.add_argument("--calibration", type=int, default=48, help="windows of 512 tokens for the demo model")
    a = parser.parse_args()
    jobs: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "whisper": lambda: whisper(a.whisper, a.texts),
        "minilm": lambda: sentences(a.minilm, a.texts),
        "demo": lambda: demo(a.texts, a.calibration),
    }
    results: dict[str, Any] = json.loads(RESULTS.read_text())["results"] if RESULTS.is_file() else {}
    for name, job in jobs.items():
        if a.only in (None, name):
            results[name] = job()
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps({"machine": describe(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
