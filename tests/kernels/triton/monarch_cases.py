"""Cases of the Triton Monarch kernels, and the program that runs them in Triton's interpreter: prints one JSON object per case.

A process of its own, because the interpreter is chosen when Triton is first imported. Outputs and workspaces start as NaN, and a guard
behind each output must stay as it was. The interpreter runs programs one after another, where a barrier of several would wait for ever: the
single launch runs with one program, which takes every tile and passes the barrier; how tiles spread over programs is what the pair of
launches shows, which are made of the same phase functions.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass

DTYPES = ("float16", "bfloat16", "float32")
SHAPES = ((48, 64, 4, 4, 3), (30, 17, 4, 3, 2), (33, 100, 2, 8, 4), (5, 9, 2, 4, 1), (70, 96, 1, 1, 9), (40, 130, 4, 2, 17))


@dataclass(frozen=True)
class Case:
    """A Monarch linear (N, K) with blocks i x o of rank t; kind "auto" leaves the choice to the cost model."""

    m: int
    n: int
    k: int
    i: int
    o: int
    t: int
    dtype: str
    values: str
    kind: str
    strided: bool = False
    bias: bool = False
    sliced: bool = False

    @property
    def name(self) -> str:
        """A readable id."""
        words = [word for word in ("strided", "bias", "sliced") if getattr(self, word)]
        return "-".join([f"{self.m}x{self.n}x{self.k}", f"{self.o}x{self.i}r{self.t}", self.dtype, self.values, self.kind, *words])


def cases() -> list[Case]:
    """Every shape with each kind of kernel, all types, rows up to the tile's and past it."""
    out = []
    for a, shape in enumerate(SHAPES):
        for b, kind in enumerate(("fused", "pair", "gemm")):
            m = (1, 2, 3, 4)[(a + b) % 4] if kind != "gemm" else (1, 17, 33)[a % 3]
            dtype = DTYPES[(a + b) % 3]
            if kind == "gemm" and dtype == "bfloat16":
                dtype = "float16"  # the interpreter's tl.dot multiplies the bit patterns of bf16; test_monarch.py compiles it
            out.append(Case(m, *shape, dtype, dtype if a % 2 else DTYPES[(a + 2 * b) % 3], kind, strided=(a + b) % 2 == 0, bias=a % 3 == 0, sliced=b == 1))
    for m in (0, 1, 3, 5, 20):
        out.append(Case(m, *SHAPES[0], DTYPES[m % 3], "bfloat16", "auto", bias=True))
    return out


def run(case: Case, *, swap: bool = False) -> dict[str, object]:
    """Relative errors of the kernel and of plain torch in the same dtype against fp64; `swap` exchanges two blocks of w1 first."""
    import torch

    from effllm.kernels.triton import monarch_launch
    from effllm.kernels.triton.monarch_choose import MonarchTiles
    from effllm.lowering import monarch_linear as ops
    from effllm.runtime.formats import monarch

    g = torch.Generator().manual_seed(0)
    dtype, values = getattr(torch, case.dtype), getattr(torch, case.values)
    s, p = monarch.sizes(case.n, case.k, case.i, case.o)
    w1 = (torch.randn(case.i * case.o * case.t, p, generator=g) * 2.0 ** torch.randint(-3, 3, (case.i * case.o * case.t, 1), generator=g) / p**0.5).to(values)
    w2 = (torch.randn(case.o * s, case.i * case.t, generator=g) * 2.0 ** torch.randint(-3, 3, (case.o * s, 1), generator=g) / case.t**0.5).to(values)
    bias = torch.randn(case.n, generator=g).to(dtype) if case.bias else None
    x = torch.randn(case.m, 2 * case.k if case.sliced else case.k, generator=g).to(dtype)[:, : case.k]
    tail = (case.n, case.i, case.o, case.strided)
    true = ops.reference(x.double(), w1.double(), w2.double(), None if bias is None else bias.double(), *tail)
    plain = ops.reference(x, w1, w2, bias, *tail)
    if swap:
        rows = w1.shape[0] // case.i
        w1 = torch.cat([w1[rows : 2 * rows], w1[:rows], w1[2 * rows :]])
    rows = 1 << max(0, case.m - 1).bit_length()
    tiles = {
        "auto": None,
        "fused": MonarchTiles("fused", rows, 8, 32, 4, 1),
        "pair": MonarchTiles("pair", min(rows, 2), 4, 16, 4, 1),
        "gemm": MonarchTiles("gemm", 16, 32, 32, 4, 1),
    }[case.kind]
    guard = torch.full((case.m * case.n + 64,), float("nan"), dtype=dtype)
    guard[case.m * case.n :] = 7.0
    out = guard[: case.m * case.n].view(case.m, case.n)
    y = monarch_launch.linear(x, w1, w2, bias, *tail, config=tiles, out=out)
    norm = true.norm().clamp_min(1e-30)
    return {
        "name": case.name if not swap else f"swapped-{case.kind}", "shape": list(y.shape), "out": case.dtype,
        "guard": bool((guard[case.m * case.n :] == 7.0).all()),
        "error": float((y.double() - true).norm() / norm), "plain": float((plain.double() - true).norm() / norm),
    }  # fmt: skip


def replayed() -> dict[str, object]:
    """The single launch again and again with one pair of counters, as a graph would: equal results, and counters back at zero."""
    import torch

    from effllm.kernels.triton import monarch_launch
    from effllm.kernels.triton.monarch_choose import MonarchTiles

    pair = torch.zeros(2, dtype=torch.int32)
    monarch_launch.counter = lambda device: pair
    w1, w2 = torch.randn(48, 16), torch.randn(48, 12)
    found, zero = [], True
    for seed in (0, 1, 0):
        x = torch.randn(2, 64, generator=torch.Generator().manual_seed(seed))
        found.append(monarch_launch.linear(x, w1, w2, None, 48, 4, 4, False, MonarchTiles("fused", 2, 8, 32, 4, 1)))
        zero &= bool((pair == 0).all())
    return {"name": "replayed", "equal": bool(torch.equal(found[0], found[2])), "differs": not torch.equal(found[0], found[1]), "zero": zero}


def main() -> None:
    """Run every case."""
    import torch

    flags = torch.utils.deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    flags.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    for case in cases():
        print(json.dumps(run(case) | {"case": asdict(case)}))
    for kind in ("fused", "pair", "gemm"):
        print(json.dumps(run(Case(2, *SHAPES[0], "float32", "float32", kind), swap=True)))
    print(json.dumps(replayed()))
    sys.stdout.flush()


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), *[os.pardir] * 3)))
    main()
