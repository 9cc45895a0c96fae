"""Products of many tokens: multiply-adds a second of the packed kernels alone, and of torch's products on the same shape, interleaved.

    python -m benchmarks.many_tokens [--threads 2] [--tokens 512] [--rounds 15]

The shapes are a layer of the demo model's once q, k, v and gate, up are merged, and one large square; weights in groups of 32 without minimum.
`w4a8` and `w8a8` get activations that are quantized already, as several linears behind one norm do; `w4` and `w8` get bf16, `w4_fp32` and `w8_fp32`
fp32. Every product is checked against fp64 on the same rounded operands before it is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cpu_gemv import packed
from benchmarks.timing import interleaved, save
from effllm.lowering import providers
from effllm.lowering.bipolar_linear import quantize_activation
from effllm.lowering.op import Problem
from effllm.runtime.formats import bipolar
from effllm.runtime.layouts import tile16

SHAPES = ((960, 576), (3072, 576), (576, 1536), (4096, 4096))
BF16, FP32 = torch.bfloat16, torch.float32
WEIGHTS = {  # bits, activations, dtype of what they are given in
    "w4a8": (4, "a8", BF16), "w8a8": (8, "a8", BF16), "w4": (4, "a16", BF16), "w8": (8, "a16", BF16), "w4_fp32": (4, "a16", FP32), "w8_fp32": (8, "a16", FP32),
}  # fmt: skip
GROUP = 32
# both round the result to bf16 (2^-9 at most); expanded weights are rounded to bf16 as well, each independently of the others
CLOSE = 2.0**-8


def product(name: str, n: int, k: int, x: Tensor) -> tuple[Callable[[], Tensor], Tensor, str]:
    """A call of the kernel, what it should give (fp64), and the kernel's name."""
    bits, act, dtype = WEIGHTS[name]
    x = x.to(dtype)
    stored = packed(n, k, bits, GROUP, 0)
    zero = bipolar.zero_point(bits, "symmetric")
    u, s, _ = tile16.rows(stored["codes"], stored["scale"], None, None, n=n, bits=bits, group=GROUP)
    w = bipolar.dequantize(u, s, None, zero, GROUP).double()
    problem = Problem("bipolar_linear_a8" if act == "a8" else "bipolar_linear", n, k, bits, GROUP, False, act, x.shape[0], dtype)
    provider, _ = providers.select(problem)
    about = (stored["codes"], stored["scale"], None, None, n, bits, GROUP, zero)
    if act == "a8":
        xq, xs = quantize_activation(x)
        return lambda: provider.call(xq, xs, *about, BF16, problem=problem), (xq.double() @ w.T) * xs.double(), provider.name
    return lambda: provider.call(x, *about, problem=problem), x.double() @ w.T, provider.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, kernel = [], ""
    for n, k in SHAPES:
        x = torch.randn(args.tokens, k, generator=torch.Generator().manual_seed(1)).to(BF16)
        calls: list[Callable[[], Tensor]] = []
        for name in WEIGHTS:
            call, true, kernel = product(name, n, k, x)
            error = float((call().double() - true).norm() / true.norm())
            if error > CLOSE:
                raise SystemExit(f"{name} at {n}x{k}: relative error {error:.2g}, not timed")
            calls.append(call)
        dense = torch.randn(n, k).to(BF16)
        calls.append(lambda x=x, dense=dense: torch.nn.functional.linear(x, dense))  # type: ignore[misc]
        wide, plain = x.float(), dense.float()
        calls.append(lambda x=wide, dense=plain: torch.nn.functional.linear(x, dense))  # type: ignore[misc]
        with torch.inference_mode():
            times = interleaved(calls, args.rounds)
        work = n * k * args.tokens / 1e9
        rows.append({"shape": f"{n}x{k}"} | {f"{name}_gmac_s": work / t for name, t in zip((*WEIGHTS, "torch_bf16", "torch_fp32"), times, strict=True)})
    save(f"many-tokens-{args.threads}t", rows, tokens=args.tokens, kernel=kernel)


if __name__ == "__main__":
    main()
