"""Runs the kernel for edited caches in Triton's interpreter against the reference: prints one JSON object per case.

No bf16: the interpreter cuts fp32 off to bf16 where GPUs round.
"""

from __future__ import annotations

import json
import os

CASES = [(d, pairs, tokens, layout, dtype, gather) for d, pairs in ((64, 32), (40, 10), (6, 3), (18, 0))
         for layout, dtype in (("half", "float32"), ("interleaved", "float16")) for tokens, gather in ((37, True), (1, False))]  # fmt: skip


def main() -> None:
    """All cases."""
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from effllm.kernels.triton.pie import pie_apply
    from effllm.lowering.pie import pie_apply_reference
    from effllm.runtime.rotary import shift_angles, turns

    for d, pairs, tokens, layout, dtype, gather in CASES:
        g = torch.Generator().manual_seed(d)
        k = torch.randn(2, tokens, 3, d, generator=g).to(getattr(torch, dtype)).transpose(1, 2)
        omega = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / max(1, pairs))
        angles = shift_angles([0, 5, -70000], omega)
        row = torch.randint(0, 3, (tokens,), generator=g, dtype=torch.int32)
        source = torch.randint(-1, tokens, (tokens,), generator=g) if gather else None
        got = pie_apply(k, source, row, *turns(angles), layout)
        true = pie_apply_reference(k.double(), source, row.long(), *turns(angles, torch.float64), layout)
        plain = pie_apply_reference(k, source, row.long(), *turns(angles), layout)
        top = float(true.norm().clamp_min(1e-30))
        print(json.dumps({"error": float((got.double() - true).norm()) / top, "plain": float((plain.double() - true).norm()) / top}))


if __name__ == "__main__":
    main()
