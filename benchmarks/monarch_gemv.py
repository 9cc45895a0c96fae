"""Monarch linears on CPU against dense bf16: decoding (M = 1 and 4) and prefill (512 rows), weights rotating past the last-level cache.

    python benchmarks/monarch_gemv.py [--threads 2] [--ratio 0.5] [--rows 1 4 512]

Every kernel is checked against fp64 before it is timed; calls take turns, and a shape is refused, with the reason, where other processes keep
the cores busy or memory reads drift (autotune/measure.py), after a few tries. `of_bytes` is the speed-up over the share that the byte ratio
allows: 1 where a kernel is as many times faster as it reads fewer bytes. Dense bf16 is PyTorch's linear and the same weight prepacked for
oneDNN; for decoding also the row loop of our own kernels on the dense weight, a faster rival than both where those fall short.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import save
from effllm.autotune import measure
from effllm.autotune.machine import measure_bandwidth
from effllm.lowering import monarch_linear as ops
from effllm.lowering import providers
from effllm.lowering.op import Problem
from effllm.runtime.formats import monarch
from effllm.solvers.monarch.factors import rank_for

COLD = 160 << 20  # bytes that the copies of a weight take
TRIES = 3
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))


Call = Callable[[int], Tensor]  # with the i-th copy of the weight


def dense(n: int, k: int, x: Tensor) -> tuple[dict[str, Call], int]:
    """Rivals with a dense bf16 weight."""
    size = n * k * 2
    weights = [torch.randn(n, k).div_(k**0.5).bfloat16() for _ in range(max(2, COLD // size))]
    found: dict[str, Call] = {}
    found["torch"] = lambda i: torch.nn.functional.linear(x, weights[i % len(weights)])
    if torch.backends.mkldnn.is_available():
        packed = [torch.ops.mkldnn._reorder_linear_weight(w, x.shape[0]) for w in weights]
        found["onednn_packed"] = lambda i: torch.ops.mkldnn._linear_pointwise(x, packed[i % len(packed)], None, "none", [], "")
    if x.shape[0] <= 4:
        # the dense weight as a first stage of one block, and a second stage of one row
        problem = Problem("monarch_linear", 1, k, 0, 0, False, m=x.shape[0], dtype=x.dtype, detail=ops.detail(1, 1, n, False, "bfloat16"))
        provider, _ = providers.select(problem)
        last, config = torch.ones(1, n).bfloat16(), {"path": "gemv", "threads": 0}
        found["own_rows"] = lambda i: provider.call(x, weights[i % len(weights)], last, None, 1, 1, 1, False, problem=problem, config=config)
    return found, size


def structured(n: int, k: int, x: Tensor, ratio: float, blocks: int) -> tuple[Call, int, float]:
    """The Monarch linear, its bytes, and its error against fp64."""
    t = rank_for(ratio, n, k, blocks, blocks, multiple=16)
    s, p = monarch.sizes(n, k, blocks, blocks)
    size = 2 * blocks * blocks * t * (s + p)
    first, second = (blocks * blocks * t, p), (blocks * s, blocks * t)
    made = [(torch.randn(first).div_(p**0.5).bfloat16(), torch.randn(second).div_(t**0.5).bfloat16()) for _ in range(max(2, COLD // size))]
    problem = Problem("monarch_linear", n, k, 0, 0, False, m=x.shape[0], dtype=x.dtype, detail=ops.detail(blocks, blocks, t, False, "bfloat16"))
    provider, _ = providers.select(problem)
    assert provider.tuning is not None
    config = provider.tuning.first(problem)

    def call(i: int) -> Tensor:
        y: Tensor = provider.call(x, *made[i % len(made)], None, n, blocks, blocks, False, problem=problem, config=config)
        return y

    true = ops.reference(x.double(), made[0][0].double(), made[0][1].double(), None, n, blocks, blocks, False)
    return call, size, float((call(0).double() - true).norm() / true.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 512])
    parser.add_argument("--seconds", type=float, default=0.3, help="of timing per call")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for m in args.rows:
            for n, k in SHAPES:
                x = torch.randn(m, k).bfloat16()
                rivals, dense_bytes = dense(n, k, x)
                ours, nbytes, error = structured(n, k, x, args.ratio, args.blocks)
                if not error < 8e-3:
                    raise SystemExit(f"{n}x{k}, {m} rows: relative error {error:.2g}, not timed")
                row = {"m": m, "shape": f"{n}x{k}", "error": error}
                rows.append(row)
                copies = -(-COLD // nbytes)  # of ours, the smallest weight
                for _ in range(TRIES):
                    session = measure.time_interleaved([ours, *rivals.values()], copies, seconds=args.seconds)
                    if session.timings:
                        break
                else:
                    row["refused"] = session.refused
                    continue
                own, *others = (t.seconds for t in session.timings)
                row |= {"us": own * 1e6, "spread_us": session.timings[0].spread * 1e6, "gb_s": nbytes / own / 1e9}
                row |= {f"{name}_us": t * 1e6 for name, t in zip(rivals, others, strict=True)}
                allowed = dense_bytes / nbytes
                faster = {"torch": others[0] / own, "best": min(others) / own}
                row |= {f"speedup_{name}": f for name, f in faster.items()} | {"byte_ratio": allowed}
                row |= {f"of_bytes_{name}": f / allowed for name, f in faster.items()}
    save(f"monarch-gemv-{args.threads}t", rows, ratio=args.ratio, blocks=args.blocks, best_read_gb_s=measure_bandwidth(args.threads))


if __name__ == "__main__":
    main()
