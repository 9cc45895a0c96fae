"""One token through N:M weights on CPU: 2:4, 4:8 and 6:8 in bf16, 8 and 4 bits, and ARMOR, beside dense bf16 and bipolar-INT.

    python benchmarks/nm_gemv.py [--threads 2] [--rounds 31] [--shape 4096x4096 --shape 11008x4096]

Weights rotate through more memory than the last-level cache holds. Every kernel is checked against fp64 before it is timed, and the
variants take turns. Bytes are those of the kernel's layout. Activations are bf16 in every row.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.timing import interleaved, save
from effllm.autotune import inputs
from effllm.autotune.machine import measure_bandwidth
from effllm.lowering import providers
from effllm.lowering.nm_linear import problem
from effllm.lowering.op import OPS, Problem

BF16 = torch.bfloat16
COLD = 160 << 20  # bytes
GROUP = 128


@dataclasses.dataclass
class Variant:
    """A way to compute one layer: a call, its bytes, the kernel's name and its relative error."""

    name: str
    call: Callable[[], Any]
    nbytes: int
    kernel: str
    error: float


def dense(n: int, k: int) -> Variant:
    """torch's product of bf16 weights."""
    weights = [torch.randn(n, k).to(BF16) for _ in range(max(2, COLD // (2 * n * k)))]
    x = torch.randn(1, k).to(BF16)
    true = x.double() @ weights[0].double().t()
    error = float((torch.nn.functional.linear(x, weights[0]).double() - true).norm() / true.norm())
    turn = iter(range(10**9))
    return Variant("dense bf16", lambda: torch.nn.functional.linear(x, weights[next(turn) % len(weights)]), 2 * n * k, "torch", error)


def packed(name: str, p: Problem) -> Variant:
    """A packed weight with the kernel that the cost model would choose."""
    provider, _ = providers.select(p)
    generate = OPS[p.op].inputs
    assert generate is not None and provider.tuning is not None
    made = generate(p, provider.layout, 1, 0)
    size = sum(t.numel() * t.element_size() for t in made.args[0][1:] if isinstance(t, torch.Tensor))
    made = inputs.copied(made, max(2, COLD // size))
    config = provider.tuning.first(p)
    expected = made.expected()[0]
    y = expected.pick(provider.call(*made.args[0], problem=p, config=config)).double()
    error = float((y - expected.true).norm() / expected.true.norm())
    plain = float((expected.plain.double() - expected.true).norm() / expected.true.norm())
    if not error <= 2 * plain + OPS[p.op].tolerance[p.dtype]:
        raise SystemExit(f"{name}: relative error {error:.2g}, plain torch {plain:.2g}; not timed")
    turn = iter(range(10**9))
    return Variant(name, lambda: provider.call(*made.args[next(turn) % len(made.args)], problem=p, config=config), size, provider.name, error)


def variants(n: int, k: int) -> list[Variant]:
    """Everything that is compared, the baselines first."""

    def sparse(keep: int, of: int, bits: int = 0, block: int = 0) -> Problem:
        op = "armor_linear" if block else "nm_bipolar_linear" if bits else "nm_linear"
        return problem(op, n, k, keep, of, values=None if bits else BF16, bits=bits, group=GROUP if bits else 0, block=block)

    coded = {bits: Problem("bipolar_linear", n, k, bits, GROUP, False, "a16", 1, BF16) for bits in (8, 4)}
    return [
        dense(n, k), packed("int8", coded[8]), packed("int4", coded[4]),
        packed("2:4 bf16", sparse(2, 4)), packed("4:8 bf16", sparse(4, 8)), packed("6:8 bf16", sparse(6, 8)),
        packed("ARMOR 64, 2:4 bf16", sparse(2, 4, block=64)),
        packed("2:4 int8", sparse(2, 4, 8)), packed("2:4 int4", sparse(2, 4, 4)), packed("4:8 int8", sparse(4, 8, 8)),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--shape", action="append")
    parser.add_argument("--name", default="nm-2core-zen4")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    best = measure_bandwidth(args.threads)
    rows = []
    for shape in args.shape or ["4096x4096", "11008x4096"]:
        n, k = map(int, shape.split("x"))
        torch.manual_seed(0)
        found = variants(n, k)
        times = dict(zip([v.name for v in found], interleaved([v.call for v in found], args.rounds), strict=True))
        for v in found:
            t = times[v.name]
            more = {f"faster_than_{base.split()[-1]}": times[base] / t for base in ("dense bf16", "int8", "int4")} | {"over_2:4": t / times["2:4 bf16"] - 1}
            rate = v.nbytes / t / 1e9
            row = {"shape": shape, "variant": v.name, "kernel": v.kernel, "us": t * 1e6, "mb": v.nbytes / 1e6, "gb_s": rate, "of_best_read": rate / best}
            rows.append(row | more | {"error": v.error})
    save(args.name, rows, threads=args.threads, group=GROUP, best_read_gb_s=best)


if __name__ == "__main__":
    main()
