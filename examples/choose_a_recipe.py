"""What different recipes cost in quality: perplexity and KL to the dense model, before anything is timed.

    python examples/choose_a_recipe.py [MODEL]
"""

from __future__ import annotations

import copy
import sys

import effllm
from effllm.hf import texts
from effllm.hf.evaluate import score
from effllm.hf.models import resolve
from effllm.hf.size import weight_size


def main(name: str = "demo", recipes: tuple[str, ...] = ("w8", "w6", "w4"), windows: int = 2, text: str | None = None) -> dict[str, dict[str, float]]:
    """Returns the scores by recipe."""
    dense, tokenizer = resolve(name)
    packed = {}
    for recipe in recipes:
        packed[recipe] = copy.deepcopy(dense)
        effllm.compress(packed[recipe], recipe)
    ids = texts.windows(tokenizer, text or texts.evaluation_text().text, 512, windows)
    scores = score({"dense": dense, **packed}, dense, ids)
    for what, model in {"dense": dense, **packed}.items():
        s = scores[what]
        print(f"{what:6s} {weight_size(model).read / 1e6:7.2f} MB  perplexity {s['perplexity']:.3f}  KL {s['kl']:.5f}  top-1 {s['top1_agreement']:.3f}")
    return scores


if __name__ == "__main__":
    main(*sys.argv[1:2])
