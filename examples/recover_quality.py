"""Cut linears down to a low-rank plus sparse form, then win back quality by distilling the dense model into what is left.

    python examples/recover_quality.py [MODEL]
"""

from __future__ import annotations

import copy
import sys
from typing import Any

from torch import nn

import effllm
from effllm.console import progress
from effllm.hf import texts
from effllm.hf.evaluate import score
from effllm.hf.models import resolve
from effllm.recovery.sparse_low_rank import SparseLowRankLinear


def shrink(model: nn.Module, keep: float, density: float = 0.02) -> None:
    """Replace every linear of the blocks by one with `keep` of its weights: a truncated SVD and, for `density` of the positions, values."""
    for parent in list(model.modules()):
        for leaf, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and leaf != "lm_head":
                n, k = child.weight.shape
                rank = max(1, int((keep - density) * n * k / (n + k)))
                setattr(parent, leaf, SparseLowRankLinear.from_dense(child.weight, rank, density, bias=child.bias))


def main(name: str = "demo", keep: float = 0.9, steps: int = 60, length: int = 256, windows: int = 4, text: str | None = None) -> dict[str, Any]:
    """Returns perplexity and KL of the dense model, the small one, and the small one after recovery."""
    dense, tokenizer = resolve(name)
    dense.requires_grad_(False)
    small = copy.deepcopy(dense)
    shrink(small, keep)
    trained = copy.deepcopy(small)
    learn = texts.windows(tokenizer, text or texts.calibration_text().text, length)
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
