"""Attention of prompts: our kernel against torch's, interleaved, on shapes of real models; both against fp64 first.

    python -m benchmarks.prompt_attention [--threads 2] [--rounds 9] [--kernel cpu-avx2]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.timing import interleaved, save
from effllm.lowering import providers
from effllm.lowering.op import OPS, Problem

# name, batch, heads, key heads, queries, keys, size, mask
SHAPES = (
    ("SmolLM2-135M, 512 tokens", 1, 9, 3, 512, 512, 64, "triangle"),
    ("the same, room for 640", 1, 9, 3, 512, 640, 64, "triangle"),
    ("Llama 8B, 512 tokens", 1, 32, 8, 512, 512, 128, "causal"),
    ("a chunk of 64 behind 2000", 1, 9, 3, 64, 2064, 64, "behind"),
    ("window of 128 of 1024", 1, 8, 4, 1024, 1024, 64, "window"),
    ("two sequences, odd sizes", 2, 4, 4, 77, 131, 72, "none"),
)


def mask_of(kind: str, queries: int, keys: int) -> Tensor | None:
    """A bool mask (1, 1, Q, S), None where there is none."""
    at, j = torch.arange(queries)[:, None], torch.arange(keys)
    behind = at + keys - queries - j
    found = {"triangle": j <= at, "behind": behind >= 0, "window": (behind >= 0) & (behind < 128)}.get(kind)
    return None if found is None else found[None, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--kernel", help="a provider's name; the best one here without it (results have its name)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        provider = providers.select(Problem("prompt_attention", 8, 64, 0, 0, False, m=512, dtype=dtype), args.kernel)[0]
        for name, batch, heads, groups, queries, keys, size, kind in SHAPES:
            g = torch.Generator().manual_seed(0)
            q = torch.randn(batch, queries, heads, size, generator=g).to(dtype).transpose(1, 2)
            k, v = (torch.randn(batch, groups, keys, size, generator=g).to(dtype) for _ in range(2))
            mask, causal, scale = mask_of(kind, queries, keys), kind == "causal", size**-0.5
            plain = OPS["prompt_attention"].providers["reference"]
            calls: list[Callable[[], Tensor]] = [lambda p=p, a=(q, k, v, mask, causal, scale): p.call(*a) for p in (plain, provider)]  # type: ignore[misc]
            true = plain.call(q.double(), k.double(), v.double(), mask, causal, scale)
            errors = [float((call().double() - true).norm() / true.norm()) for call in calls]
            if errors[1] > 4 * errors[0]:
                raise SystemExit(f"{name}, {dtype}: error {errors[1]:.2g} where torch's is {errors[0]:.2g}, not timed")
            with torch.inference_mode():
                times = interleaved(calls, args.rounds)
            rows.append({"shape": name, "dtype": str(dtype).removeprefix("torch."), "ms": times[1] * 1e3, "torch_ms": times[0] * 1e3,
                         "faster": times[0] / times[1], "error": errors[1], "torch_error": errors[0]})  # fmt: skip
    save("prompt-attention" if args.kernel is None else f"prompt-attention-{args.kernel}", rows)


if __name__ == "__main__":
    main()
