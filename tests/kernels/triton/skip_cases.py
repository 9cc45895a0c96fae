"""Cases of the Triton kernels that skip channels, run in Triton's interpreter by `main`: one JSON object per case."""

from __future__ import annotations

import json
import os

KINDS: tuple[tuple[str, int, int, bool], ...] = (
    ("sparse_linear", 0, 0, False), ("sparse_up_linear", 0, 0, False), ("rsparse_linear", 0, 0, False),
    ("sparse_bipolar_linear", 4, 32, False), ("sparse_bipolar_linear", 8, 16, True), ("sparse_bipolar_linear", 3, 0, False),
    ("sparse_bipolar_linear", 4, 128, True),
    ("sparse_up_bipolar_linear", 4, 32, True), ("sparse_up_bipolar_linear", 8, 64, False), ("sparse_up_bipolar_linear", 4, 0, False),
)  # fmt: skip
SHAPES = ((1, 37, 200, 0.5), (3, 140, 70, 0.3), (4, 16, 64, 1.0), (1, 130, 33, 0.0), (6, 20, 40, 0.5))


def names() -> list[str]:
    """Every kind at every shape."""
    return [f"{op}-w{bits}g{group}{'a' if affine else ''}-{m}x{n}x{k}-d{d}" for op, bits, group, affine in KINDS for m, n, k, d in SHAPES]


def main() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from effllm.autotune import inputs
    from effllm.kernels.triton import skip_launch, skip_ops
    from effllm.lowering import providers
    from effllm.lowering.sparse_linear import problem

    providers.load("cpu")
    every = iter(names())
    for op, bits, group, affine in KINDS:
        for i, (m, n, k, density) in enumerate(SHAPES):
            rank = 5 if op == "rsparse_linear" else 0
            about = {"bits": bits, "group": group, "affine": affine, "rank": rank, "density": density, "limit": -1 if i % 2 else 4}
            p = problem(op, n, k, m=m, dtype=torch.float32, values=torch.float32, **about)
            made = inputs.make(p, skip_ops.LAYOUTS[op], 1)
            args, expected = made.args[0], made.expected()[0]
            if op == "sparse_linear" and i == 0:  # a forced split
                y = skip_launch.by_input(args[0], args[1], None, args[2], None, None, None, None, args[3], n=n, split=2)
            else:
                y = getattr(skip_ops, {
                    "sparse_linear": "skip_input", "sparse_up_linear": "skip_output", "rsparse_linear": "skip_rest",
                    "sparse_bipolar_linear": "skip_input_codes", "sparse_up_bipolar_linear": "skip_output_codes",
                }[op])._init_fn(*args)  # fmt: skip
            size = expected.true.norm().clamp_min(1e-30)
            x = args[0].clone()
            x[0, 1] = float("nan")
            nan = None
            if m <= 4 and "up" not in op:
                again = (args[0].new_tensor([1e30]), *args[2:])
                nan = _nan(skip_ops, op, (x, *again))
            row = {"name": next(every), "error": float((y.double() - expected.true).norm() / size), "shape": list(y.shape), "nan": nan}
            row["plain"] = float((expected.plain.double() - expected.true).norm() / size)
            print(json.dumps(row))


def _nan(ops, op, args):  # type: ignore[no-untyped-def]
    name = {"sparse_linear": "skip_input", "rsparse_linear": "skip_rest", "sparse_bipolar_linear": "skip_input_codes"}[op]
    return bool(getattr(ops, name)._init_fn(*args)[0].isnan().all())


if __name__ == "__main__":
    main()
