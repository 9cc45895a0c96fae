"""Prefill: 512 tokens through the demo model's layer shapes, packed kernels against bf16 oneDNN, interleaved.

    python benchmarks/prefill.py [--threads 2]
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.timing import interleaved, save
from effllm.recipe import Bipolar
from effllm.runtime.packed import PackedLinear
from effllm.runtime.weights import BipolarWeight
from effllm.solvers import solve

SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536), (4096, 4096))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for n, k in SHAPES:
        torch.compiler.reset()
        w = torch.randn(n, k) / k**0.5
        x = torch.randn(args.tokens, k).bfloat16()
        dense = w.bfloat16()
        layers = {"w4a8": Bipolar(4, act="a8"), "w4": Bipolar(4), "w8": Bipolar(8)}
        packed = {name: PackedLinear(BipolarWeight(solve(w, p), act=p.act, dtype=torch.bfloat16)) for name, p in layers.items()}
        true = x.double() @ w.double().T
        for name, layer in packed.items():
            error = float((layer(x).double() - true).norm() / true.norm())
            if error > 0.15:
                raise SystemExit(f"{name} at {n}x{k}: relative error {error:.2g}, not timed")
        # compiled, so that the quantization of activations is fused as it is in a model
        packed = {name: torch.compile(layer, dynamic=False) for name, layer in packed.items()}
        with torch.inference_mode():
            calls = [lambda dense=dense, x=x: torch.nn.functional.linear(x, dense)] + [lambda layer=layer, x=x: layer(x) for layer in packed.values()]
            times = interleaved(calls, args.rounds)
        row = {"shape": f"{n}x{k}", "bf16_ms": times[0] * 1e3}
        row |= {f"{name}_vs_bf16": times[0] / t for name, t in zip(packed, times[1:], strict=True)}
        rows.append(row)
    save(f"prefill-{args.threads}t", rows, tokens=args.tokens)


if __name__ == "__main__":
    main()
