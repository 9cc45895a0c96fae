"""Cases of the Triton kernels, and the program that runs them in Triton's interpreter: prints one JSON object per case.

A process of its own, because the interpreter is chosen when Triton is first imported. Outputs and workspaces start as NaN, and
a guard behind each output must stay as it was.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass

BITS = tuple(range(1, 9))
GROUPS = (16, 32, 64, 128, 0)
GRIDS = ("symmetric", "integer", "affine")
DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Case:
    """A linear. kind "auto" leaves the choice to the cost model; `split` and `kind` else fix it."""

    m: int
    n: int
    k: int
    bits: int
    group: int
    grid: str
    dtype: str
    kind: str = "auto"
    split: int = 1
    a8: bool = False
    bias: bool = False
    strided: bool = False
    wide_scale: bool = False

    @property
    def name(self) -> str:
        """A readable id."""
        parts = [f"{self.m}x{self.n}x{self.k}", f"w{self.bits}", f"g{self.group}", self.grid, self.dtype, self.kind, f"s{self.split}"]
        return "-".join(parts + [word for word in ("a8", "bias", "strided", "wide_scale") if getattr(self, word)])


def cases() -> list[Case]:
    """Every axis at least once with each kernel; small, the interpreter runs about 10^5 elements a second."""
    out = []
    for i, bits in enumerate(BITS):
        for j, kind in enumerate(("gemv", "gemm", "dense")):
            out.append(Case(1 + i % 3, 37, 200, bits, GROUPS[(i + j) % 5], GRIDS[(i + j) % 3], DTYPES[(i + 2 * j) % 3], kind, bias=i % 2 == 0))
    for i, group in enumerate(GROUPS):
        for grid in GRIDS:
            out.append(Case(1, 16, 256, 4, group, grid, "float16", "gemv", split=2))
            out.append(Case(5, 33, 130, 3, group, grid, DTYPES[i % 3], "gemm", split=2, bias=True))
        out.append(Case(2, 17, 140, 1, group, "affine", "bfloat16", "gemv", split=2))
        out.append(Case(1, 5, 96, 4, group, GRIDS[i % 3], "float16", "gemv", a8=True))
        out.append(Case(4, 40, 160, 8, group, GRIDS[(i + 1) % 3], "float32", "gemm", split=2, a8=True, bias=True))
    for i, m in enumerate((1, 2, 3, 16, 17, 129)):
        out.append(Case(m, 1, 72, 4, 32, "affine", DTYPES[i % 3]))
        out.append(Case(m, 33, 100, 2 + i, 16, "symmetric", DTYPES[(i + 1) % 3], bias=True))
        out.append(Case(m, 33, 100, 4, 64, "integer", "float32", a8=True))
    for bits in (1, 7, 8):
        out.append(Case(3, 21, 128, bits, 32, "symmetric", "float32", "gemv", a8=True))
        out.append(Case(3, 21, 128, bits, 64, "affine", "float16", "gemm", a8=True))
    for kind in ("gemv", "gemm", "dense"):
        out.append(Case(4, 19, 70, 5, 32, "affine", "float32", kind, strided=True, wide_scale=True, bias=True))
        out.append(Case(0, 19, 70, 4, 32, "symmetric", "float16", kind))
    out.append(Case(1, 64, 1, 4, 16, "symmetric", "float16", "gemv"))
    out.append(Case(1, 16, 256, 4, 32, "symmetric", "float32", "gemv", split=4))
    return out


def run(case: Case, *, swap: bool = False) -> dict[str, object]:
    """Relative errors of the kernel and of plain torch in the same dtype against fp64; `swap` exchanges two groups' scales first."""
    import torch

    from effllm.kernels.triton import launch
    from effllm.kernels.triton.config import Tiles
    from effllm.lowering import bipolar_linear as ops
    from effllm.runtime.formats import bipolar
    from effllm.runtime.layouts import words

    gen = torch.Generator().manual_seed(hash((case.m, case.n, case.k, case.bits, case.group)) % 2**31)
    dtype = getattr(torch, case.dtype)
    kp, g = bipolar.padded(case.k, case.group), bipolar.groups(case.k, case.group)
    u = torch.randint(0, 2**case.bits, (case.n, kp), generator=gen, dtype=torch.uint8)
    scale = torch.exp2(torch.rand(case.n, g, generator=gen) * 8 - 10).to(torch.float32 if case.wide_scale else torch.float16)
    low = (-scale * 2**case.bits * (0.5 + torch.rand(case.n, g, generator=gen))).to(scale.dtype) if case.grid == "affine" else None
    packed = bipolar.make(u, scale, low, k=case.k, bits=case.bits, group=case.group, grid=case.grid)
    zero = bipolar.zero_point(case.bits, case.grid)
    x = torch.randn(case.m, 2 * case.k if case.strided else case.k, generator=gen).add(0.3).to(dtype)
    x = x[:, ::2] if case.strided else x
    bias = torch.randn(case.n, generator=gen).to(dtype) if case.bias else None
    t = words.repack(packed)
    if swap:
        t["scale"][:2] = t["scale"][:2].flip(0).clone()
    xs = None
    if case.a8:
        x, xs = ops.quantize_activation(x)
    # the interpreter truncates where the hardware rounds to bf16, so bf16 activations are checked with an fp32 output
    out_dtype = torch.float32 if dtype == torch.bfloat16 else dtype
    configs = {
        "gemv": Tiles("gemv", {1: 1, 2: 2}.get(case.m, 4), 32, 64, case.split),
        "gemm": Tiles("gemm", 16, 32, 64 if case.group in (64, 128) else 32, case.split),
        "dense": Tiles("dense"),
    }
    guard = 64
    buffer = torch.full((case.m * case.n + guard,), float("nan"), dtype=out_dtype)
    buffer[case.m * case.n :] = 7.0
    out = buffer[: case.m * case.n].view(case.m, case.n)
    y = launch.linear(
        x, xs, t["codes"], t["scale"], t.get("minimum"), bias, n=case.n, bits=case.bits, group=case.group, zero=zero, dtype=out_dtype,
        config=configs.get(case.kind), out=out,
    )  # fmt: skip
    planes = (packed.tensors["planes"], packed.tensors["scale"], packed.tensors.get("minimum"), bias, case.n, case.bits, case.group, zero)
    plain = ops.LINEAR.reference(x.to(out_dtype), *planes) if xs is None else ops.LINEAR_A8.reference(x, xs, *planes, out_dtype)
    exact = x.double() @ bipolar.unpack(packed, torch.float64).t()
    exact = (exact if xs is None else exact * xs.double()) + (0 if bias is None else bias.double())
    size = float(exact.norm()) or 1.0
    return {
        "error": float((y.double() - exact).norm()) / size,
        "plain": float((plain.double() - exact).norm()) / size,
        "shape": list(y.shape),
        "guard": bool((buffer[case.m * case.n :] == 7.0).all()),
        "out": str(out_dtype).removeprefix("torch."),
    }


def opcheck() -> dict[str, object]:
    """torch's own checks of both graph ops, with the launcher standing in for the CUDA kernel."""
    import torch

    from effllm.kernels.triton import launch, ops
    from effllm.lowering.bipolar_linear import quantize_activation
    from effllm.runtime.formats import bipolar
    from effllm.runtime.layouts import words

    ops.linear.register_kernel("cpu")(
        lambda x, c, s, low, bias, n, bits, group, zero: launch.linear(x, None, c, s, low, bias, n=n, bits=bits, group=group, zero=zero, dtype=x.dtype)
    )
    ops.linear_a8.register_kernel("cpu")(
        lambda x, xs, c, s, low, bias, n, bits, group, zero, dtype: launch.linear(x, xs, c, s, low, bias, n=n, bits=bits, group=group, zero=zero, dtype=dtype)
    )
    u = torch.randint(0, 16, (24, 64), dtype=torch.uint8)
    t = words.repack(bipolar.make(u, torch.rand(24, 2), None, k=64, bits=4, group=32, grid="symmetric"))
    found: dict[str, object] = {}
    for lead in ((2, 3), (5,), (0,)):
        x = torch.randn(*lead, 64)
        weight = (t["codes"], t["scale"], None, None, 24, 4, 32, 7.5)
        found[f"a16{lead}"] = torch.library.opcheck(torch.ops.effllm_triton.linear.default, (x, *weight))
        found[f"a8{lead}"] = torch.library.opcheck(torch.ops.effllm_triton.linear_a8.default, (*quantize_activation(x), *weight, torch.float16))
    return found


def main() -> None:
    """Run all cases (or those named on the command line) in the interpreter."""
    os.environ["TRITON_INTERPRET"] = "1"
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]

    # Triton's interpreter multiplies the bit patterns of bf16 operands; widen them, which is exact
    dot = interpreter.InterpreterBuilder.create_dot

    def widened(self, a, b, d, *rest):  # type: ignore[no-untyped-def]
        if a.dtype.scalar == tl.bfloat16:
            a, b = (interpreter.TensorHandle(interpreter._convert_float(h.data, tl.bfloat16, tl.float32, None).view("float32"), tl.float32) for h in (a, b))
        return dot(self, a, b, d, *rest)

    interpreter.InterpreterBuilder.create_dot = widened
    for case in cases():
        print(json.dumps({"name": case.name, "case": asdict(case)} | run(case)), flush=True)
    for kind in ("gemv", "gemm", "dense"):
        case = Case(2, 32, 128, 4, 32, "symmetric", "float16", kind)
        print(json.dumps({"name": f"swapped-{kind}"} | run(case, swap=True)), flush=True)
    print(json.dumps({"name": "opcheck"} | opcheck()), flush=True)
    split = Case(1, 16, 256, 4, 32, "symmetric", "float32", "gemv", split=4)
    print(json.dumps({"name": "twice", "equal": run(split) == run(split)}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
