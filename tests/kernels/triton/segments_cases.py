"""Cases of attention by segments in Triton's interpreter: prints one JSON object per case."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Case:
    """Heads, key heads, head sizes, options, and rows of a program."""

    heads: int
    groups: int
    size: int
    value: int
    dtype: str
    rows: int
    window: int = 0
    softcap: float = 0.0

    @property
    def name(self) -> str:
        """A readable id."""
        return "-".join(str(x) for x in (self.heads, self.groups, self.size, self.value, self.dtype, self.rows, self.window, self.softcap))


def cases() -> list[Case]:
    """Odd heads per key head, sizes that are no power of two, blocks smaller and larger than segments."""
    return [
        Case(6, 2, 16, 16, "float32", 16), Case(9, 3, 24, 40, "float32", 64, window=7), Case(4, 4, 40, 24, "float16", 16, softcap=2.0),
        Case(5, 1, 16, 16, "float16", 32, window=40, softcap=3.0), Case(8, 1, 64, 64, "float16", 64), Case(2, 2, 16, 16, "bfloat16", 16, window=1),
    ]  # fmt: skip


SEGMENTS = ((0, 5, 3, 5), (5, 1, 10, 20), (8, 6, 30, 21), (20, 45, 60, 80), (65, 1, 140, 1), (66, 30, 145, 30))
T, P = 98, 180


def run(case: Case) -> dict[str, object]:
    """Relative errors of the kernel and of plain torch in the same dtype against fp64; whether uncovered queries stayed zero."""
    import torch

    from effllm.kernels.triton import segments_launch
    from effllm.lowering.packed_attention import packed_attention_reference
    from effllm.runtime.segments import Segment, table

    gen = torch.Generator().manual_seed(case.heads * 100 + case.size)
    dtype = getattr(torch, case.dtype)
    q = torch.randn(1, case.heads, T, case.size, generator=gen).to(dtype)
    k, v = (torch.randn(P, case.groups, d, generator=gen).to(dtype).transpose(0, 1)[None] for d in (case.size, case.value))
    rows = table([Segment(*s) for s in SEGMENTS], T, P)
    k[:, :, 0:3] = v[:, :, 0:3] = float("nan")  # nobody's
    if dtype == torch.bfloat16:  # the interpreter truncates where the hardware rounds to bf16: checked in fp32
        q, k, v = q.float(), k.float(), v.float()
    how = {"BM": case.rows, "BN": 16, "num_warps": 4, "num_stages": 2}
    y = segments_launch.attention(q, k, v, rows, 0.3, case.window, case.softcap, how)
    plain = packed_attention_reference(q, k, v, rows, 0.3, case.window, case.softcap)
    exact = double(q, k, v, case)
    uncovered = torch.ones(T, dtype=torch.bool)
    for s in SEGMENTS:
        uncovered[s[0] : s[0] + s[1]] = False
    return {
        "error": float((y.double() - exact).norm() / exact.norm()), "plain": float((plain.double() - exact).norm() / exact.norm()),
        "zeros": bool((y[0, uncovered] == 0).all()), "shape": list(y.shape), "dtype": str(y.dtype).removeprefix("torch."),
    }  # fmt: skip


def double(q, k, v, case: Case):  # type: ignore[no-untyped-def]
    """fp64, query by query."""
    import torch

    out = torch.zeros(1, T, case.heads, case.value, dtype=torch.float64)
    for q_start, q_len, k_start, k_len in SEGMENTS:
        for i in range(q_len):
            end = k_start + k_len - q_len + i + 1
            first = max(k_start, end - case.window) if case.window else k_start
            for h in range(case.heads):
                g = h // (case.heads // case.groups)
                score = 0.3 * (k[0, g, first:end].double() @ q[0, h, q_start + i].double())
                score = case.softcap * (score / case.softcap).tanh() if case.softcap else score
                out[0, q_start + i, h] = score.softmax(0) @ v[0, g, first:end].double()
    return out


def main() -> None:
    """Run all cases in the interpreter."""
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.set_num_threads(1)
    for case in cases():
        print(json.dumps({"name": case.name, **asdict(case), **run(case)}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
