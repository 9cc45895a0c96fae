"""CPU GEMV of one large layer (11008 x 4096 by default): time, packed GB/s next to the machine's read bandwidth, ratio to W4.

    python benchmarks/cpu_gemv.py [--threads 2] [--group 128]

Weights rotate through more memory than the last-level cache holds. Every kernel is checked against fp64 before it is timed.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.timing import interleaved, save
from effllm.autotune.machine import measure_bandwidth
from effllm.lowering import providers
from effllm.lowering.bipolar_linear import quantize_activation
from effllm.lowering.op import Problem
from effllm.runtime.formats import bipolar
from effllm.runtime.layouts import tile16

COLD = 192 << 20  # bytes


def packed(n: int, k: int, bits: int, group: int, seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (n // 16, k // 32, 64 * bits), generator=g, dtype=torch.uint8)
    return {"codes": codes, "scale": torch.rand(n // 16, k // group, 16, generator=g).half()}


def check(run: object, weight: dict[str, torch.Tensor], x: torch.Tensor, problem: Problem) -> float:
    n, bits, group = problem.n, problem.bits, problem.group
    zero = bipolar.zero_point(bits, "symmetric")
    u, s, _ = tile16.rows(weight["codes"], weight["scale"], None, None, n=n, bits=bits, group=group)
    w = bipolar.dequantize(u, s, None, zero, group).double()
    xq, xs = quantize_activation(x)
    true = (xq.double() @ w.T) * xs.double()
    y = run(xq, xs, weight["codes"], weight["scale"], None, None, n, bits, group, zero, torch.float32, problem=problem)
    return float((y.double() - true).norm() / true.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--n", type=int, default=11008)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    n, k, group = args.n, args.k, args.group
    provider, _ = providers.select(Problem("bipolar_linear_a8", n, k, 4, group, False, "a8", 1, torch.float32))
    x = torch.randn(1, k)
    xq, xs = quantize_activation(x)
    calls, sizes, errors = [], [], []
    for bits in (8, 4, 3, 2, 1):
        size = n * k * bits // 8 + n * k // group * 2
        weights = [packed(n, k, bits, group, i) for i in range(max(2, COLD // size))]
        problem = Problem("bipolar_linear_a8", n, k, bits, group, False, "a8", 1, torch.float32)
        errors.append(check(provider.call, weights[0], x, problem))
        if errors[-1] > 1e-5:
            raise SystemExit(f"W{bits}: relative error {errors[-1]:.2g}, not timed")
        turn = iter(range(10**9))
        zero = bipolar.zero_point(bits, "symmetric")

        def call(weights=weights, bits=bits, zero=zero, turn=turn, problem=problem) -> None:  # type: ignore[no-untyped-def]
            w = weights[next(turn) % len(weights)]
            provider.call(xq, xs, w["codes"], w["scale"], None, None, n, bits, group, zero, torch.float32, problem=problem)

        calls.append(call)
        sizes.append(size)
    buffer = torch.ones(COLD // 4)
    calls.append(lambda: buffer.sum())
    times = interleaved(calls, args.rounds)
    reading = COLD / times[-1] / 1e9
    best = measure_bandwidth(args.threads)
    rows = []
    for bits, size, t, error in zip((8, 4, 3, 2, 1), sizes, times, errors, strict=False):
        rate = size / t / 1e9
        shares = {"of_read_bandwidth": rate / reading, "of_best_read": rate / best}
        rows.append({"bits": bits, "ms": t * 1e3, "gb_s": rate, **shares, "faster_than_w4": times[1] / t, "error": error})
    save(f"cpu-gemv-{args.threads}t", rows, kernel=provider.name, shape=[n, k], group=group, read_gb_s=reading, best_read_gb_s=best)
    print(f"read bandwidth in the same run {reading:.1f} GB/s (best {best:.1f}), {provider.name}, {args.threads} threads")


if __name__ == "__main__":
    main()
