"""torch.compile with the effllm backend and nothing else: faster, while the dense weights stay in memory.

    python examples/backend_only.py [MODEL]
"""

from __future__ import annotations

import sys

import torch

import effllm
from effllm.hf.models import resolve


def main(name: str = "demo") -> float:
    """Returns the relative difference of the logits to the dense model's."""
    model, _ = resolve(name)
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        dense = model(input_ids=ids, use_cache=False).logits.float()
        fast = torch.compile(model, backend="effllm", options={"recipe": "w8"})
        packed = fast(input_ids=ids, use_cache=False).logits.float()
    difference = float((packed - dense).norm() / dense.norm())
    print(effllm.last_report())
    print(f"relative difference of the logits: {difference:.4f}")
    return difference


if __name__ == "__main__":
    main(*sys.argv[1:2])
