"""Cases of the low-rank Triton kernels, and the program that runs them in Triton's interpreter: prints one JSON object per case.

The interpreter runs one program after another, so the barrier of the one-launch kernel can only be passed by a grid of one program; the two
stages, which are the same code, run as two launches with many.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Case:
    """Low-rank linears that share x, and how to run them; `shapes` are outputs and rank of each. With `bits` (of A and B) kind is "stages"."""

    m: int
    k: int
    shapes: tuple[tuple[int, int], ...]
    channels: int
    dtype: str
    kind: str
    split: int = 1
    bias: bool = False
    strided: bool = False
    pivots: bool = False
    bits: tuple[int, int] = (0, 0)
    group: int = 32
    affine: bool = False

    @property
    def name(self) -> str:
        """A readable id."""
        sizes = "+".join(f"{n}r{rank}" for n, rank in self.shapes)
        parts = [f"{self.m}x{self.k}", sizes, f"c{self.channels}", self.dtype, self.kind, f"s{self.split}"]
        words = [word for word in ("bias", "strided", "pivots", "affine") if getattr(self, word)]
        return "-".join(parts + words + ([f"w{self.bits[0]}{self.bits[1]}g{self.group}"] if self.bits[0] else []))


def cases() -> list[Case]:
    """Every kind with odd sizes, splits, channels, pivots, siblings, and rows on both sides of a block."""
    out = []
    one = ((37, 19),)
    for i, m in enumerate((1, 2, 3, 5, 8)):
        for kind in ("apart", "fused"):
            out.append(Case(m, 130, one, 3 * (i % 2), DTYPES[i % 3], kind, 1 + i % 3, bias=i % 2 == 0, strided=i == 2))
            shapes = ((37, 19), (16, 5), (21, 20), (50, 33), (18, 3))[: 2 + i % 4]  # five siblings: two launches
            out.append(Case(m, 130, shapes, 0, DTYPES[(i + 1) % 3], kind, 1 + (i + 1) % 3, strided=i == 4, pivots=i % 2 == 1))
            out.append(Case(m, 130, ((60, 39),), 0, DTYPES[(i + 2) % 3], kind, 1 + (i + 2) % 3, bias=i % 2 == 1, pivots=True))
    for i, m in enumerate((16, 17, 33)):
        out.append(Case(m, 70, one, 5 * (i % 2), DTYPES[i], "dot", bias=True, strided=i == 1))
        out.append(Case(m, 70, ((60, 39),), 0, DTYPES[i], "dot", bias=i != 1, pivots=True))
        out.append(Case(m, 70, ((37, 19), (20, 18)), 0, DTYPES[i], "dot", pivots=i != 0))
    out.append(Case(1, 64, ((16, 1),), 0, "float32", "apart"))
    out.append(Case(0, 64, ((16, 4),), 0, "float32", "dot"))
    return out + coded()


def coded() -> list[Case]:
    """Bipolar factors: equal and unequal grids, through the GEMV and the GEMM, alone and as siblings, whose sizes fill tiles."""
    pair = ((32, 16), (48, 32))
    return [
        Case(1, 130, ((37, 19),), 0, "float32", "stages", bits=(4, 4), bias=True),
        Case(2, 70, ((37, 19),), 0, "float32", "stages", bits=(8, 3), bias=True, pivots=True, affine=True),
        Case(1, 96, pair, 0, "float16", "stages", bits=(4, 2), group=0),
        Case(3, 64, pair, 0, "float32", "stages", bits=(8, 4), affine=True),
        Case(17, 96, pair, 0, "float16", "stages", bits=(4, 8)),
        Case(17, 70, ((300, 39),), 0, "float32", "stages", bits=(4, 5), pivots=True, strided=True),
        Case(0, 64, ((16, 16),), 0, "float32", "stages", bits=(4, 4)),
    ]


def run(case: Case) -> dict[str, object]:
    """Relative errors of the kernel and of plain torch in the output's dtype against fp64; the counter after the call."""
    import torch

    from effllm.kernels.triton import lowrank_launch

    gen = torch.Generator().manual_seed(hash((case.m, case.k, case.shapes)) % 2**31)
    dtype = getattr(torch, case.dtype)
    x = torch.randn(case.m, 2 * case.k if case.strided else case.k, generator=gen).to(dtype)
    x = x[:, ::2] if case.strided else x
    factors = [(n - r if case.pivots else n, r) for n, r in case.shapes]
    a = [torch.randn(n, r + case.channels, generator=gen).to(dtype) for n, r in factors]
    b = [torch.randn(r, case.k, generator=gen).to(dtype) for _, r in factors]
    channels = torch.randperm(case.k, generator=gen)[: case.channels] if case.channels else None
    pivots = [torch.randperm(n, generator=gen) for n, _ in case.shapes] if case.pivots else []
    n = sum(size for size, _ in case.shapes)
    bias = torch.randn(n, generator=gen).to(dtype) if case.bias else None
    if dtype == torch.bfloat16:  # the interpreter truncates where the hardware rounds to bf16: activations are checked in fp32
        x = x.float()
    buffer = torch.full((case.m * n + 64,), float("nan"), dtype=x.dtype)
    buffer[case.m * n :] = 7.0
    out = buffer[: case.m * n].view(case.m, n)
    if case.bits[0]:
        y, a, b = _coded(case, x, a, b, pivots, bias, out)
    else:
        weights = [lowrank_launch.Weight(a[i], b[i], pivots[i] if pivots else None) for i in range(len(a))]
        how = lowrank_launch.Plan(case.kind, br=16, bk=32, split=case.split, programs=1, bm=16, bn=16)
        y = lowrank_launch.lowrank(x, weights, channels, bias, how=how, out=out)
    exact = _plain(x.double(), a, b, channels, pivots, bias)
    size = float(exact.norm()) or 1.0
    return {
        "error": float((y.double() - exact).norm()) / size,
        "plain": float((_plain(x, a, b, channels, pivots, bias).double() - exact).norm()) / size,
        "same": y.data_ptr() == out.data_ptr(),
        "guard": bool((buffer[case.m * n :] == 7.0).all()),
        "counters": [int(v) for c in lowrank_launch._counters.values() for v in c],
        "out": str(x.dtype).removeprefix("torch."),
    }


def _plain(x, a, b, channels, pivots, bias):  # type: ignore[no-untyped-def]
    """Plain torch in x's dtype, written out: column i of the stored order is output pivots[i]."""
    import torch

    found = []
    for i, (second, first) in enumerate(zip(a, b, strict=True)):
        z = x @ first.to(x.dtype).T
        middle = z if channels is None else torch.cat([z, x[:, channels]], 1)
        y = middle @ second.to(x.dtype).T
        if pivots:
            whole = torch.empty(x.shape[0], pivots[i].shape[0], dtype=x.dtype)
            whole[:, pivots[i]] = torch.cat([z, y], 1)
            y = whole
        found.append(y)
    return torch.cat(found, 1) + (0 if bias is None else bias.to(x.dtype))


def _coded(case, x, a, b, pivots, bias, out):  # type: ignore[no-untyped-def]
    """The output through bipolar factors, and the factors' exact values."""
    import torch

    from effllm.autotune.lowrank_inputs import _random
    from effllm.kernels.triton import lowrank_bipolar_launch as launch
    from effllm.kernels.triton.config import Tiles
    from effllm.runtime.formats import bipolar
    from effllm.runtime.layouts import words

    gen = torch.Generator().manual_seed(case.m + case.k)
    pairs, values = [], ([], [])
    zero = [bipolar.zero_point(bits, "affine" if case.affine else "symmetric") for bits in case.bits]
    for shapes in zip(a, b, strict=True):
        pair = []
        for which, dense in enumerate(shapes):
            packed = _random(*dense.shape, case.bits[which], case.group, case.affine, torch.float16, gen)
            values[which].append(bipolar.unpack(packed).double())
            t = words.repack(packed)
            pair.append(launch.Factor(t["codes"], t["scale"], t.get("minimum"), dense.shape[0], case.bits[which], case.group, zero[which]))
        pairs.append(tuple(pair))
    tiles = Tiles("gemm", 16, 32, 32) if case.m > 8 else Tiles("gemv", 1 if case.m == 1 else 2, 16, 32, split=1 + case.m % 2)
    y = launch.lowrank(x, pairs, pivots[0] if pivots else None, bias, how=(tiles, tiles), out=out)
    return y, *values


def through_ops() -> list[dict[str, object]]:
    """Every op's provider and its graph op, run on CPU tensors in the interpreter, against the reference."""
    from dataclasses import replace

    import torch

    from effllm.kernels import triton as kernels
    from effllm.kernels.triton import lowrank_ops
    from effllm.lowering import lowrank_bipolar_linear, lowrank_linear
    from effllm.lowering.op import OPS

    kernels.register()
    for op in (lowrank_ops.lowrank, lowrank_ops.lowrank_bipolar):
        op.register_kernel("cpu")(op._init_fn)
    about = {"bits": 4, "group": 32, "affine": False, "b_bits": 3, "m": 1, "dtype": torch.float32}
    problems = [
        lowrank_linear.problem_of("lowrank_linear", 40, 64, 16, torch.float32, m=2, dtype=torch.float32, pivoted=True),
        lowrank_linear.problem_of("lowrank_linear_many", 128, 64, 32, torch.float32, m=1, dtype=torch.float32, pivoted=True),
        lowrank_bipolar_linear.problem_of("lowrank_bipolar_linear", 48, 64, 16, **about),
        lowrank_bipolar_linear.problem_of("lowrank_bipolar_linear_many", 128, 64, 64, **about),
    ]
    found = []
    for problem in problems:
        op = OPS[problem.op]
        provider = op.providers["triton"]
        made = op.inputs(problem, provider.layout, 1, 0)
        expected = made.expected()[0]
        # the interpreter passes a barrier of one program only, and the plan of a GPU has more: two launches
        lowrank_ops.launch._counter = lambda device: None
        y = expected.pick(getattr(torch.ops.effllm, problem.op)(*made.args[0], "triton")).double()
        again = expected.pick(provider.call(*made.args[0], problem=replace(problem, device="cpu"), config=dict(provider.tuning.first(problem)))).double()
        size = float(expected.true.norm())
        error = max(float((t - expected.true).norm()) / size for t in (y, again))
        found.append({"name": f"op {problem.op}", "error": error, "limit": 2e-6})
    return found


def main() -> None:
    """Run all cases in the interpreter."""
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    for case in cases():
        print(json.dumps({"name": case.name, "case": asdict(case)} | run(case)), flush=True)
    for row in through_ops():
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
