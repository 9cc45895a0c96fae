"""Read many prompts of very different lengths in one go: packed against padded to the longest, and the same answers.

    python examples/prefill_many_prompts.py [MODEL]
"""

from __future__ import annotations

import sys
import time

import torch

import effllm
from effllm.hf.models import resolve

QUESTIONS = ["Why is the sky blue?", "Name three rivers.", "Write a sentence about a fox.", "What is two plus two?"]


def main(name: str = "demo", count: int = 16, tokens: int = 8) -> dict[str, float]:
    """Seconds and tokens of both ways; raises where the first answers differ."""
    model, tokenizer = resolve(name, torch.float32)
    texts = [" ".join(QUESTIONS[: 1 + i % 4] * (1 + (i * i) // 12)) for i in range(count)]
    prompts = [torch.tensor(tokenizer(t)["input_ids"]) for t in texts]
    packing = effllm.prepack(prompts, capacity=max(256, max(map(len, prompts))))

    start = time.perf_counter()
    packed = effllm.generate(model, prompts, max_new_tokens=tokens, eos_token_id=[])
    middle = time.perf_counter()
    longest = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(p, (longest - len(p), 0)) for p in prompts])
    mask = torch.stack([torch.arange(longest) >= longest - len(p) for p in prompts]).long()
    padded = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    end = time.perf_counter()

    for p, mine, theirs in zip(prompts, packed, padded, strict=True):
        if mine[len(p)] != theirs[longest]:
            raise SystemExit("packed and padded prompts disagree")
    figures = {"packed_s": middle - start, "padded_s": end - middle, "tokens": packing.tokens, "padded_tokens": packing.padded_tokens}
    print(f"{count} prompts in {len(packing.bins)} bins: {packing.tokens} tokens instead of {packing.padded_tokens}")
    print(f"packed {figures['packed_s']:.2f} s, padded {figures['padded_s']:.2f} s for {tokens} new tokens each")
    return figures


if __name__ == "__main__":
    main(*sys.argv[1:2])
