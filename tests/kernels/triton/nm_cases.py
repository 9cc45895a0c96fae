"""Cases of the 2:4 Triton kernels, and the program that runs them in Triton's interpreter: one JSON object per case.

A process of its own, because the interpreter is chosen when Triton is first imported. Outputs start as NaN with a guard behind them.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Case:
    """An N:M linear; `split` 0 leaves the choice to the launcher."""

    m: int
    n: int
    k: int
    path: str
    dtype: str = "float16"
    bits: int = 0
    group: int = 0
    affine: bool = False
    block: int = 0
    split: int = 1
    bias: bool = False
    strided: bool = False
    values: str = "float16"

    @property
    def name(self) -> str:
        """A readable id."""
        kept = f"w{self.bits}g{self.group}" if self.bits else self.values
        words = [word for word in ("affine", "bias", "strided") if getattr(self, word)]
        return "-".join([f"{self.m}x{self.n}x{self.k}", self.path, self.dtype, kept, f"b{self.block}", f"s{self.split}", *words])


def cases() -> list[Case]:
    """Every path with every kind of value, odd shapes, splits and blocks."""
    out = []
    for path, m in (("gemv", 1), ("gemv", 3), ("gemm", 5), ("dense", 6)):
        for i, (bits, group, affine) in enumerate(((0, 0, False), (8, 32, False), (4, 128, True), (8, 0, True), (4, 16, False))):
            split = 2 if i % 2 and path != "dense" else 1
            out.append(Case(m, 37, 200, path, ("float16", "float32")[i % 2], bits, group, affine, split=split, bias=i % 2 == 0))
        out.append(Case(m, 64, 96, path, "float32", values="bfloat16", block=16, bias=True))
        out.append(Case(m, 64, 320, path, "float16", block=32, split=2 if path != "dense" else 1, bias=True))
        out.append(Case(m, 128, 128, path, "float16", 8, 64, block=64))
        out.append(Case(m, 1, 64, path, "float32", values="float32"))
        out.append(Case(m, 20, 72, path, "float16", strided=True))
    out.append(Case(17, 33, 64, "gemm", "float32", values="float32"))
    out.append(Case(1, 40, 640, "", "float16", split=0))
    out.append(Case(2, 40, 640, "", "float16", split=0))
    out.append(Case(20, 40, 64, "", "float16", split=0))
    out.append(Case(0, 40, 64, ""))
    return out


def run(case: Case, *, swap: bool = False) -> dict[str, object]:
    """Relative errors of the kernel and of plain torch in the same dtype against fp64; `swap` exchanges two index words first."""
    import torch

    from effllm.autotune import nm_inputs
    from effllm.kernels.triton import nm_launch
    from effllm.lowering import nm_linear as ops
    from effllm.lowering.op import OPS
    from effllm.runtime import formats
    from effllm.runtime.layouts import nm_words

    op = "armor_linear" if case.block else "nm_bipolar_linear" if case.bits else "nm_linear"
    dtype = getattr(torch, case.dtype)
    values = None if case.bits else getattr(torch, case.values)
    stored = {"values": values, "bits": case.bits, "group": case.group, "affine": case.affine, "block": case.block}
    problem = ops.problem(op, case.n, case.k, 2, 4, m=case.m, dtype=dtype, **stored)
    packed = nm_inputs.weight(problem)
    gen = torch.Generator().manual_seed(case.m)
    x = torch.randn(case.m, 2 * case.k if case.strided else case.k, generator=gen).to(dtype)
    x = x[:, ::2] if case.strided else x
    bias = torch.randn(case.n, generator=gen).to(dtype) if case.bias else None
    t = nm_words.repack(packed)
    if swap:
        t["index"][:2] = t["index"][:2].flip(0).clone()
    buffer = torch.full((case.m * case.n + 64,), float("nan"), dtype=dtype)
    buffer[case.m * case.n :] = 7.0
    out = buffer[: case.m * case.n].view(case.m, case.n)
    zero = (2**case.bits - 1) / 2 if case.bits else 0.0
    y = nm_launch.linear(
        x, t["values"], t.get("scale"), t.get("minimum"), t["index"], t.get("left"), t.get("right"), bias,
        n=case.n, bits=case.bits, group=case.group, zero=zero, path=case.path, split=case.split, out=out,
    )  # fmt: skip
    plain = OPS[op].reference(*nm_inputs.arguments(packed, op, "nm_plain", x, bias))
    exact = x.double() @ formats.get(packed.format).unpack(packed, torch.float64).t() + (0 if bias is None else bias.double())
    size = float(exact.norm()) or 1.0
    return {
        "error": float((y.double() - exact).norm()) / size,
        "plain": float((plain.double() - exact).norm()) / size,
        "shape": list(y.shape),
        "guard": bool((buffer[case.m * case.n :] == 7.0).all()),
    }


def opcheck() -> dict[str, object]:
    """torch's own checks of the graph op, with the launcher standing in for the CUDA kernel."""
    import torch

    from effllm.autotune import nm_inputs
    from effllm.kernels.triton import nm_launch, nm_ops
    from effllm.lowering import nm_linear as ops
    from effllm.runtime.layouts import nm_words

    nm_ops.nm_linear.register_kernel("cpu")(
        lambda *args: nm_launch.linear(*args[:8], n=args[8], bits=args[9], group=args[10], zero=args[11])
    )
    t = nm_words.repack(nm_inputs.weight(ops.problem("nm_linear", 24, 64, 2, 4, values=torch.float32)))
    found: dict[str, object] = {}
    for lead in ((2, 3), (1,), (0,)):
        args = (torch.randn(*lead, 64), t["values"], None, None, t["index"], None, None, None, 24, 0, 0, 0.0)
        found[str(lead)] = torch.library.opcheck(torch.ops.effllm_triton.nm_linear.default, args)
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
    for path in ("gemv", "gemm", "dense"):
        print(json.dumps({"name": f"swapped-{path}"} | run(Case(2, 32, 128, path), swap=True)), flush=True)
    print(json.dumps({"name": "opcheck"} | opcheck()), flush=True)
    split = Case(1, 16, 512, "gemv", "float32", split=4)
    print(json.dumps({"name": "twice", "equal": run(split) == run(split)}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
