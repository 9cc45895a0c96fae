"""Monarch linears on CPU against dense bf16: decoding (M = 1 and 4) and prefill (512 rows), weights rotating past the last-level cache.

    python benchmarks/monarch_gemv.py [--threads 2] [--ratio 0.5] [--rows 1 4 512]

Every kernel is checked against fp64 before it is timed; calls take turns. `of_bytes` is the speed-up over the share that the byte ratio
allows: 1 where a kernel is as many times faster as it reads fewer bytes. Dense bf16 is PyTorch's linear and the same weight prepacked for
oneDNN; for decoding also the row loop of our own kernels on the dense weight, a faster rival than both where those fall short.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.timing import interleaved, save
from effllm.autotune.machine import measure_bandwidth
from effllm.lowering import monarch_linear as ops
from effllm.lowering import providers
from effllm.lowering.op import Problem
from effllm.runtime.formats import monarch
from effllm.solvers.monarch.factors import rank_for

COLD = 160 << 20  # bytes that the copies of a weight take
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))


def turns(copies: int) -> Callable[[], int]:
    """The numbers 0 .. copies - 1, again and again."""
    at = iter(range(10**9))
    return lambda: next(at) % copies


def dense(n: int, k: int, x: Tensor) -> tuple[dict[str, Callable[[], Tensor]], int]:
    """Rivals with a dense bf16 weight."""
    size = n * k * 2
    weights = [torch.randn(n, k).div_(k**0.5).bfloat16() for _ in range(max(2, COLD // size))]
    found: dict[str, Callable[[], Tensor]] = {}
    one = turns(len(weights))
    found["torch"] = lambda: torch.nn.functional.linear(x, weights[one()])
    if torch.backends.mkldnn.is_available():
        packed = [torch.ops.mkldnn._reorder_linear_weight(w, x.shape[0]) for w in weights]
        two = turns(len(packed))
        found["onednn_packed"] = lambda: torch.ops.mkldnn._linear_pointwise(x, packed[two()], None, "none", [], "")
    if x.shape[0] <= 4:
        # the dense weight as a first stage of one block, and a second stage of one row
        problem = Problem("monarch_linear", 1, k, 0, 0, False, m=x.shape[0], dtype=x.dtype, detail=ops.detail(1, 1, n, False, "bfloat16"))
        provider, _ = providers.select(problem)
        last, three = torch.ones(1, n).bfloat16(), turns(len(weights))
        found["own_rows"] = lambda: provider.call(x, weights[three()], last, None, 1, 1, 1, False, problem=problem, config={"path": "gemv", "threads": 0})
    return found, size


def structured(n: int, k: int, x: Tensor, ratio: float, blocks: int) -> tuple[Callable[[], Tensor], int, float]:
    """The Monarch linear, its bytes, and its error against fp64."""
    t = rank_for(ratio, n, k, blocks, blocks, multiple=16)
    s, p = monarch.sizes(n, k, blocks, blocks)
    size = 2 * blocks * blocks * t * (s + p)
    first, second = (blocks * blocks * t, p), (blocks * s, blocks * t)
    made = [(torch.randn(first).div_(p**0.5).bfloat16(), torch.randn(second).div_(t**0.5).bfloat16()) for _ in range(max(2, COLD // size))]
    problem = Problem("monarch_linear", n, k, 0, 0, False, m=x.shape[0], dtype=x.dtype, detail=ops.detail(blocks, blocks, t, False, "bfloat16"))
    provider, _ = providers.select(problem)
    assert provider.tuning is not None
    config, turn = provider.tuning.first(problem), turns(len(made))

    def call() -> Tensor:
        y: Tensor = provider.call(x, *made[turn()], None, n, blocks, blocks, False, problem=problem, config=config)
        return y

    true = ops.reference(x.double(), made[0][0].double(), made[0][1].double(), None, n, blocks, blocks, False)
    return call, size, float((call().double() - true).norm() / true.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 512])
    parser.add_argument("--rounds", type=int, default=0, help="0: 40 for decoding, 7 for prefill")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    with torch.inference_mode():
        for m in args.rows:
            for n, k in SHAPES:
                x = torch.randn(m, k).bfloat16()
                rivals, dense_bytes = dense(n, k, x)
                ours, nbytes, error = structured(n, k, x, args.ratio, args.blocks)
                if not error < 8e-3:
                    raise SystemExit(f"{n}x{k}, {m} rows: relative error {error:.2g}, not timed")
                own, *others = interleaved([ours, *rivals.values()], args.rounds or (40 if m < 64 else 7))
                row = {"m": m, "shape": f"{n}x{k}", "us": own * 1e6, "gb_s": nbytes / own / 1e9, "error": error}
                row |= {f"{name}_us": t * 1e6 for name, t in zip(rivals, others, strict=True)}
                allowed = dense_bytes / nbytes
                row |= {"speedup_torch": others[0] / own, "speedup_best": min(others) / own, "byte_ratio": allowed}
                row |= {"of_bytes_torch": row["speedup_torch"] / allowed, "of_bytes_best": row["speedup_best"] / allowed}
                rows.append(row)
    save(f"monarch-gemv-{args.threads}t", rows, ratio=args.ratio, blocks=args.blocks, best_read_gb_s=measure_bandwidth(args.threads))


if __name__ == "__main__":
    main()
