"""Cases of the low-rank Triton kernels, and the program that runs them in Triton's interpreter: prints one JSON object per case.

The interpreter runs one program after another, so the barrier of the one-launch kernel can only be passed by a grid of one program; the two
stages, which are the same code, run as two launches with many.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Case:
    """A low-rank linear and how to run it."""

    m: int
    n: int
    k: int
    rank: int
    channels: int
    dtype: str
    kind: str
    split: int = 1
    bias: bool = False
    strided: bool = False

    @property
    def name(self) -> str:
        """A readable id."""
        parts = [f"{self.m}x{self.n}x{self.k}r{self.rank}c{self.channels}", self.dtype, self.kind, f"s{self.split}"]
        return "-".join(parts + [word for word in ("bias", "strided") if getattr(self, word)])


def cases() -> list[Case]:
    """Every kind with odd sizes, splits, channels, and rows on both sides of a block."""
    out = []
    for i, m in enumerate((1, 2, 3, 5, 8)):
        for kind in ("apart", "fused"):
            dtype = ("float32", "float16", "bfloat16")[i % 3]
            out.append(Case(m, 37, 130, 19, 3 * (i % 2), dtype, kind, 1 + i % 3, bias=i % 2 == 0, strided=i == 2))
    for i, m in enumerate((16, 17, 33)):
        out.append(Case(m, 37, 70, 19, 5 * (i % 2), ("float32", "float16", "bfloat16")[i], "dot", bias=True, strided=i == 1))
    out.append(Case(1, 16, 64, 1, 0, "float32", "apart"))
    out.append(Case(0, 16, 64, 4, 0, "float32", "dot"))
    return out


def run(case: Case) -> dict[str, object]:
    """Relative errors of the kernel and of plain torch in the output's dtype against fp64; the counter after the call."""
    import torch

    from effllm.kernels.triton import lowrank_launch
    from effllm.lowering.lowrank_linear import lowrank_reference

    gen = torch.Generator().manual_seed(hash((case.m, case.n, case.k, case.rank)) % 2**31)
    dtype = getattr(torch, case.dtype)
    x = torch.randn(case.m, 2 * case.k if case.strided else case.k, generator=gen).to(dtype)
    x = x[:, ::2] if case.strided else x
    a, b = torch.randn(case.n, case.rank + case.channels, generator=gen).to(dtype), torch.randn(case.rank, case.k, generator=gen).to(dtype)
    channels = torch.randperm(case.k, generator=gen)[: case.channels] if case.channels else None
    bias = torch.randn(case.n, generator=gen).to(dtype) if case.bias else None
    if dtype == torch.bfloat16:  # the interpreter truncates where the hardware rounds to bf16: activations are checked in fp32
        x = x.float()
    buffer = torch.full((case.m * case.n + 64,), float("nan"), dtype=x.dtype)
    buffer[case.m * case.n :] = 7.0
    out = buffer[: case.m * case.n].view(case.m, case.n)
    how = lowrank_launch.Plan(case.kind, br=16, bk=32, split=case.split, programs=1, bm=16, bn=16)
    y = lowrank_launch.lowrank(x, a, b, channels, bias, how=how, out=out)
    middle = x.double() @ b.double().T
    if channels is not None:
        middle = torch.cat([middle, x.double()[:, channels]], 1)
    exact = middle @ a.double().T + (0 if bias is None else bias.double())
    plain = lowrank_reference(x, a, b, channels, None, bias)
    size = float(exact.norm()) or 1.0
    return {
        "error": float((y.double() - exact).norm()) / size,
        "plain": float((plain.double() - exact).norm()) / size,
        "guard": bool((buffer[case.m * case.n :] == 7.0).all()),
        "counters": [int(v) for c in lowrank_launch._counters.values() for v in c],
        "out": str(x.dtype).removeprefix("torch."),
    }


def main() -> None:
    """Run all cases in the interpreter."""
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    for case in cases():
        print(json.dumps({"name": case.name, "case": asdict(case)} | run(case)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
