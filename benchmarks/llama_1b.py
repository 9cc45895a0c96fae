"""Decode of a 16-layer 1B-shape Llama with random weights: w4a8 against torch's baselines, interleaved (see `effllm bench`).

    python benchmarks/llama_1b.py [--baseline inductor-bf16 ...] [--recipe w4a8]
"""

from __future__ import annotations

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.timing import save
from effllm.hf import measure, variants
from effllm.hf.variants import Shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--baseline", action="append")
    parser.add_argument("--recipe", action="append")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16().eval().requires_grad_(False)
    shape = Shape(prompt=32, tokens=args.tokens, prefill=64)
    ids = torch.randint(0, config.vocab_size, (1, shape.prefill))
    built = [variants.baseline(b, model, shape, compile_prefill=False) for b in args.baseline or ["inductor-bf16", "inductor-fp32-autotune"]]
    built += [variants.recipe(r, model, shape, compile_prefill=False) for r in args.recipe or ["w4a8"]]
    for v in built:
        v.notes.append(f"error {measure.check(v, ids, shape):.2g}")
    times = measure.measure(built, ids, shape, args.rounds)
    rates = {name: sorted(shape.tokens / t for t in taken.decode) for name, taken in times.items()}
    rows = [{"variant": name, "decode_tok_s": r[len(r) // 2], "min": r[0], "max": r[-1]} for name, r in rates.items()]
    best = max(r["decode_tok_s"] for r in rows if not r["variant"].startswith("effllm"))
    for r in rows:
        r["vs_best_baseline"] = r["decode_tok_s"] / best
    save("llama-1b-shape", rows, parameters=sum(p.numel() for p in model.parameters()))


if __name__ == "__main__":
    main()
