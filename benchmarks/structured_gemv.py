"""Structured weights on CPU: time of one linear next to PyTorch's dense bf16 linear, and how much of the bytes saved becomes time saved.

    python -m benchmarks.structured_gemv [--rows lowrank,lowrank-w8,lowrank-w4] [--shapes 4096x4096,...] [--m 1] [--threads 2]

Weights rotate through twice the last-level cache, variants take turns, and every kernel is checked against fp64 before it is timed. A row is
a function of a shape (N, K) and a number of tokens; rows and shapes that a run leaves out keep their stored results.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.timing import RESULTS, interleaved, save
from effllm.autotune import inputs
from effllm.autotune.use import choose
from effllm.lowering import lowrank_bipolar_linear, lowrank_linear, providers
from effllm.lowering.op import Problem

NAME = "structured-2core-zen4"
SHAPES = ("4096x4096", "11008x4096", "4096x11008", "576x576", "1536x576", "192x576")


@dataclass(frozen=True)
class Row:
    """A weight ready to be multiplied: one call uses the next copy. `error` is that of the kernel over that of plain torch in the same dtype."""

    call: Callable[[], Any]
    nbytes: int
    error: float
    about: dict[str, Any]


def half_rank(n: int, k: int) -> int:
    """The rank at which two factors hold half of the dense weight's values: K / 4 for a square one. A multiple of 16."""
    return max(16, round(n * k / (2 * (n + k)) / 16) * 16)


def of_problem(problem: Problem, **about: Any) -> Row:
    """The best provider's kernel on random operands, verified."""
    provider, _ = providers.select(problem)
    made = inputs.make(problem, provider.layout)
    config = choose(provider, problem).config

    def run(args: tuple[Any, ...]) -> torch.Tensor:
        y: torch.Tensor = provider.call(*args, problem=problem, config=config)
        return y

    y, worst = run(made.args[0]), 0.0
    for part in made.expected():
        got, true = part.pick(y).double(), part.true.double()
        worst = max(worst, float((got - true).norm() / (part.plain.double() - true).norm().clamp_min(1e-12)))
    turn = itertools.cycle(made.args)
    return Row(lambda: run(next(turn)), made.nbytes, worst, {"kernel": provider.name, "config": config} | about)


def dense(n: int, k: int, m: int) -> Row:
    """PyTorch's bf16 linear."""
    nbytes = 2 * n * k
    x = torch.randn(m, k).bfloat16()
    weights = itertools.cycle([torch.randn(n, k).div(k**0.5).bfloat16() for _ in range(inputs.rotation(nbytes, "cpu"))])
    return Row(lambda: torch.nn.functional.linear(x, next(weights)), nbytes, 0.0, {})


def lowrank(n: int, k: int, m: int) -> Row:
    """bf16 factors at half of the dense bytes."""
    rank = half_rank(n, k)
    return of_problem(lowrank_linear.problem_of("lowrank_linear", n, k, rank, torch.bfloat16, m=m, dtype=torch.bfloat16), rank=rank)


def lowrank_bipolar(bits: int) -> Callable[[int, int, int], Row]:
    """The same rank with bipolar factors of `bits` bits in groups of 128 with fp16 scales."""

    def row(n: int, k: int, m: int) -> Row:
        rank = half_rank(n, k)
        problem = lowrank_bipolar_linear.problem_of("lowrank_bipolar_linear", n, k, rank, bits=bits, group=128, affine=False, m=m, dtype=torch.bfloat16)
        return of_problem(problem, rank=rank, bits=bits)

    return row


ROWS: dict[str, Callable[[int, int, int], Row]] = {"lowrank": lowrank, "lowrank-w8": lowrank_bipolar(8), "lowrank-w4": lowrank_bipolar(4)}


def measure(shape: str, names: list[str], m: int, rounds: int) -> list[dict[str, Any]]:
    """One line per row of a shape, with the dense linear of the same run."""
    n, k = (int(part) for part in shape.split("x"))
    base = dense(n, k, m)
    rows = [ROWS[name](n, k, m) for name in names]
    for name, row in zip(names, rows, strict=True):
        if not row.error <= 2.0:
            raise SystemExit(f"{name} {shape}: error {row.error:.3g} times that of plain torch, not timed")
    times = interleaved([base.call, *(row.call for row in rows)], rounds)
    lines = []
    for name, row, t in zip(names, rows, times[1:], strict=True):
        saved, faster = base.nbytes / row.nbytes, times[0] / t
        about = {"row": name, "shape": shape, "m": m} | row.about
        figures = {"us": t * 1e6, "dense_us": times[0] * 1e6, "gb_s": row.nbytes / t / 1e9, "dense_gb_s": base.nbytes / times[0] / 1e9}
        figures |= {"byte_ratio": saved, "speedup": faster, "of_byte_ratio": faster / saved}
        lines.append(about | figures | {"error": row.error})
    return lines


def kept(names: list[str], shapes: list[str], m: int) -> list[dict[str, Any]]:
    """Stored results that this run does not replace."""
    path = RESULTS / f"{NAME}.json"
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    return [r for r in old if r["row"] not in names or r["shape"] not in shapes or r["m"] != m]


def main() -> None:
    """Run the chosen rows over the chosen shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--m", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--dry", action="store_true", help="print only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    names, shapes = args.rows.split(","), args.shapes.split(",")
    rows = [line for shape in shapes for line in measure(shape, names, args.m, args.rounds)]
    if args.dry:
        for row in rows:
            print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
        return
    save(NAME, kept(names, shapes, args.m) + rows)


if __name__ == "__main__":
    main()
