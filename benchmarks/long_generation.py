"""A long generation on static caches: resident memory, live tensors and compiled graphs on the way.

    python -m benchmarks.long_generation [--tokens 10000] [--threads 1]

A random Llama of two layers continues a prompt of eight tokens through `effllm.stream(..., compile=True)`: what could grow is the same as in a large model,
and a step takes half a millisecond.
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

import effllm
from benchmarks.timing import save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         max_position_embeddings=2 * args.tokens)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    rows: list[dict[str, Any]] = []
    begin = 0.0
    for n, _ in enumerate(effllm.stream(model, [torch.arange(8)], max_new_tokens=args.tokens, eos_token_id=[], compile=True), 1):
        if n == 2:
            begin = time.perf_counter()
        if n in (100, args.tokens // 2, args.tokens):
            rate = (n - 2) / (time.perf_counter() - begin)
            gc.collect()
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
            tensors = sum(isinstance(o, Tensor) for o in gc.get_objects())
            rows.append({"token": n, "resident_bytes": resident, "tensors": tensors, "graphs": counters["stats"]["unique_graphs"], "tok_s": rate})
    save("long_generation", rows, threads=args.threads)


if __name__ == "__main__":
    main()
