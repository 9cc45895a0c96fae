"""One token through weights whose channels are skipped, beside dense ones: bf16 and 4 bits, on CPU.

    python -m benchmarks.sparse_gemv [--threads 2] [--rounds 15] [--shape 8192x2048:up --shape 2048x8192:in] [--bits 0 --bits 4]
                                    [--small-pages] [--repeats 1]

Weights rotate through more memory than the last-level cache holds, and lie in large pages, as those of a packed model do
(`--small-pages`: where the allocator puts them). Every kernel is checked against fp64 before it is timed, and the variants
take turns. `in` skips inputs (query, output, down, and every linear of TEAL and R-Sparse), `up` outputs (the up projection behind a gate).
The dense baselines are PyTorch's linear and, for 4 bits, the bipolar linear with the configuration that its cost model chooses; in bf16 also
the kernel itself with every channel read, which is the fastest dense product of bf16 weights here.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from benchmarks.timing import interleaved, save
from effllm.autotune import inputs
from effllm.autotune.machine import measure_bandwidth
from effllm.lowering import providers
from effllm.lowering.op import OPS, Problem
from effllm.lowering.sparse_linear import problem
from effllm.runtime import pages

BF16 = torch.bfloat16
COLD = 128 << 20  # bytes
GROUP = 32
LARGE = True  # pages
# Llama-3.2-1B's and the demo model's, with what CHESS skips on each
SHAPES = ("8192x2048:up", "2048x8192:in", "2048x2048:in", "1536x576:up", "576x1536:in", "576x576:in")


@dataclasses.dataclass
class Variant:
    """A way to compute one layer: its name, a call, the bytes that it reads, its relative error."""

    name: str
    call: Callable[[], Any]
    nbytes: float
    error: float


def place(tensor: Tensor) -> Tensor:
    """The tensor where a packed model would hold it."""
    return pages.place(tensor) if LARGE else tensor


def _held(made: inputs.Operands) -> inputs.Operands:
    return dataclasses.replace(made, args=[tree_map_only(Tensor, place, args) for args in made.args])


def dense(n: int, k: int) -> Variant:
    """torch's product of bf16 weights."""
    weights = [place(torch.randn(n, k).to(BF16)) for _ in range(max(2, COLD // (2 * n * k)))]
    x, turn = torch.randn(1, k).to(BF16), iter(range(10**9))
    true = x.double() @ weights[0].double().t()
    error = float((torch.nn.functional.linear(x, weights[0]).double() - true).norm() / true.norm())
    return Variant("torch bf16", lambda: torch.nn.functional.linear(x, weights[next(turn) % len(weights)]), 2 * n * k, error)


def variant(name: str, p: Problem, share: float) -> Variant:
    """An op with the kernel and the configuration that the cost model would choose, checked; `share` of the codes or values is read."""
    provider, _ = providers.select(p)
    generate = OPS[p.op].inputs
    assert generate is not None and provider.tuning is not None
    made = generate(p, provider.layout, 1, 0)
    config, expected = provider.tuning.first(p), made.expected()[0]
    y = expected.pick(provider.call(*made.args[0], problem=p, config=config)).double()
    error = float((y - expected.true).norm() / expected.true.norm())
    plain = float((expected.plain.double() - expected.true).norm() / expected.true.norm())
    if not error <= 2 * plain + OPS[p.op].tolerance[p.dtype]:
        raise SystemExit(f"{name}: relative error {error:.2g}, plain torch {plain:.2g}; not timed")
    made = _held(inputs.copied(made, max(2, COLD // made.nbytes)))
    turn = iter(range(10**9))
    return Variant(name, lambda: provider.call(*made.args[next(turn) % len(made.args)], problem=p, config=config), made.nbytes * share, error)


def variants(n: int, k: int, side: str, bits: int, densities: list[float]) -> list[Variant]:
    """The baselines first, then the sparse kernel at every density."""
    op = {("in", 0): "sparse_linear", ("up", 0): "sparse_up_linear", ("in", 4): "sparse_bipolar_linear", ("up", 4): "sparse_up_bipolar_linear"}[side, bits]
    found = [variant("dense w4", Problem("bipolar_linear", n, k, bits, GROUP, False, "a16", 1, BF16), 1.0) if bits else dense(n, k)]
    return found + [variant(f"sparse {1 - d:.0%}", problem(op, n, k, m=1, bits=bits, group=GROUP if bits else 0, density=d), d) for d in densities]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=1, help="of all rounds, on the same memory; the last is kept")
    parser.add_argument("--shape", action="append")
    parser.add_argument("--bits", type=int, action="append", choices=(0, 4))
    parser.add_argument("--density", type=float, action="append")
    parser.add_argument("--name", default="sparse-2core-zen4")
    parser.add_argument("--small-pages", action="store_true")
    args = parser.parse_args()
    global LARGE
    LARGE = not args.small_pages
    torch.set_num_threads(args.threads)
    best = measure_bandwidth(args.threads)
    rows: list[dict[str, Any]] = []
    for bits in args.bits or [0, 4]:
        total: dict[str, float] = {}
        for shape in args.shape or (SHAPES if not bits else ("4096x11008:in", "11008x4096:up")):
            size, _, side = shape.partition(":")
            n, k = map(int, size.split("x"))
            torch.manual_seed(0)
            found = variants(n, k, side or "in", bits, args.density or [1.0, 0.5])
            for repeat in range(args.repeats):
                times = dict(zip([v.name for v in found], interleaved([v.call for v in found], args.rounds), strict=True))
                if args.repeats > 1:
                    print(shape, f"repeat {repeat + 1}:", ", ".join(f"{name} {t * 1e6:.0f} us" for name, t in times.items()), flush=True)
            own = [times["sparse 0%"]] if not bits and "sparse 0%" in times else []
            fastest = min([times[found[0].name], *own])
            for v in found:
                t = times[v.name]
                ratios = {"faster_than_" + found[0].name.replace(" ", "_"): times[found[0].name] / t, "faster_than_best_dense": fastest / t}
                row = {"shape": shape, "bits": bits or 16, "variant": v.name, "us": t * 1e6, "mb": v.nbytes / 1e6, "gb_s": v.nbytes / t / 1e9}
                rows.append(row | ratios | {"error": v.error})
                if n >= 2048:
                    total[v.name] = total.get(v.name, 0.0) + t
        base = next(iter(total.values()), 0.0)
        rows += [{"shape": "large shapes together", "bits": bits or 16, "variant": v, "us": t * 1e6, "faster_than_dense": base / t} for v, t in total.items()]
    save(args.name, rows, threads=args.threads, group=GROUP, large_pages=LARGE, best_read_gb_s=best)


if __name__ == "__main__":
    main()
