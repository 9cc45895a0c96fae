"""Cases of attention over turned keys in Triton's interpreter: prints one JSON object per case."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

# key heads, query heads per key head, head size, turning pairs, queries, keys, dtype, layout, mask, how rows lie, splits
CASES: tuple[tuple[Any, ...], ...] = (
    (2, 3, 40, 10, 3, 70, "float32", "half", "none", "mixed", 1), (2, 4, 64, 32, 1, 200, "float32", "half", "token", "runs", 2),
    (1, 4, 64, 32, 2, 150, "float16", "interleaved", "bool", "runs", 2), (1, 2, 24, 6, 1, 100, "float32", "interleaved", "added", "mixed", 4),
    (2, 1, 128, 64, 1, 130, "float16", "half", "none", "one", 3), (1, 20, 16, 8, 4, 80, "float32", "half", "bool", "runs", 1),
    (1, 4, 64, 32, 1, 150, "bfloat16", "half", "token", "runs", 2), (1, 2, 32, 0, 1, 65, "float32", "half", "none", "mixed", 2),
)  # fmt: skip


def run(case: tuple[Any, ...]) -> dict[str, Any]:
    """Relative errors of the kernel and of attention over keys that were turned and rounded, against fp64."""
    import torch

    from effllm.kernels.triton.rotated_launch import attention
    from effllm.lowering.pie import rotated_attention_reference
    from effllm.runtime.rotary import rotate, shift_angles, turns

    groups, repeat, d, pairs, count, keys, dtype, layout, kind, lie, splits = case
    kind_of, g, heads = getattr(torch, dtype), torch.Generator().manual_seed(d + count), groups * repeat
    q = torch.randn(2, count, heads, d, generator=g).to(kind_of).transpose(1, 2)
    k, v = (torch.randn(2, keys, groups, d, generator=g).to(kind_of).transpose(1, 2) for _ in range(2))
    angles = shift_angles([0, -7, 12345, 1], 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / max(1, pairs)))
    rows = {"mixed": torch.randint(0, 4, (keys,), generator=g), "runs": torch.arange(keys) * 3 // keys + 1, "one": torch.full((keys,), 2)}[lie].int()
    seen = torch.rand(2, 1, count, keys, generator=g) > 0.3
    added = torch.randn(1, heads, count, keys, generator=g)
    mask = {"none": None, "token": seen[:, :, :1], "bool": seen, "added": added}[kind]
    cos, sin = turns(angles)
    y = attention(q, k, v, mask, rows, cos, sin, layout, 0.3, splits)
    exact = (*turns(angles, torch.float64), layout, 0.3)
    true = rotated_attention_reference(q.double(), k.double(), v.double(), mask, rows.long(), *exact)
    moved = rotate(k, cos[rows.long()], sin[rows.long()], layout).to(kind_of)
    bias = mask if mask is None or mask.dtype == torch.bool else mask.to(kind_of)
    plain = torch.nn.functional.scaled_dot_product_attention(q, moved, v, bias, scale=0.3, enable_gqa=True)
    wrong = attention(q, k, v, mask, rows.flip(0), cos, sin, layout, 0.3, splits)
    size = true.norm()
    error, other, far = (float((x.double() - true).norm() / size) for x in (y, plain, wrong))
    return {"error": error, "plain": other, "wrong": far, "shape": list(y.shape), "dtype": str(y.dtype)}


def main() -> None:
    """All cases."""
    os.environ["TRITON_INTERPRET"] = "1"
    import torch
    from interpreter_bf16 import patch

    patch()
    torch.set_num_threads(1)
    for case in CASES:
        print(json.dumps({"name": str(case), **run(case)}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
