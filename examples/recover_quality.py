"""Cut a model to 80 % of its bytes by low rank, then win back quality by distilling the dense model into the factors.

    python examples/recover_quality.py [MODEL]
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import effllm
from effllm.console import progress
from effllm.hf import texts
from effllm.hf.evaluate import score
from effllm.hf.models import resolve


def main(
    name: str = "demo", recipe: str = "whitened(ratio=0.8)", steps: int = 60, length: int = 256, windows: int = 4, text: str | None = None
) -> dict[str, Any]:
    """Returns perplexity and KL of the dense model, the small one, and the small one after recovery."""
    dense, tokenizer = resolve(name)
    dense.requires_grad_(False)
    learn = texts.windows(tokenizer, text or texts.calibration_text().text, length)
    small = copy.deepcopy(dense)
    print(effllm.compress(small, recipe, learn[:32]))
    trained = copy.deepcopy(small)
    with progress("recover") as bar:
        report = effllm.recover(trained, dense, learn, steps, progress=lambda done, total, what: bar(what, done / total))
    print(report)
    held_out = texts.windows(tokenizer, text or texts.evaluation_text().text, length, windows)
    scores = score({"dense": dense, "small": small, "recovered": trained}, dense, held_out)
    for what, s in scores.items():
        print(f"{what:10s} perplexity {s['perplexity']:.3f}  KL {s['kl']:.4f}  top-1 {s['top1_agreement']:.3f}")
    return scores


if __name__ == "__main__":
    main(*sys.argv[1:2])
