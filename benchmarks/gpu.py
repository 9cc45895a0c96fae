"""Packed GEMV and GEMM and compressed caches on a CUDA or ROCm GPU: verified, tuned as `effllm tune` does, timed in turns with a cold L2 cache.

Every timing is a CUDA graph of one call per weight copy; the copies together exceed four times the L2 cache, so each call reads
its weight from memory. Each is kept in the tuning store, wrong results and failures as such. Achieved bandwidth (packed bytes over
time) stands next to the device's measured copy bandwidth, and the time next to the bound that no kernel can beat.

    python -m benchmarks.gpu [--json FILE] [--rows 1 16] [--budget 20]
    python -m benchmarks.gpu --predict [cuda:90]     what the cost model says of a GPU that need not be there
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHAPES = ((4096, 4096), (8192, 8192), (11008, 4096))  # (N, K)
BITS = (8, 4, 2, 1)
RESULTS = Path(__file__).parent / "results"


def copies(nbytes: int, l2: int) -> int:
    """Weight copies whose sum exceeds four L2 caches; at least 2, at most 64."""
    return min(64, max(2, -(-4 * l2 // nbytes) + 1))


def graph_seconds(calls: list[Callable[[], Any]], repeats: int = 20) -> tuple[float, float]:
    """Median seconds per call of a graph that runs `calls` once each, and the relative spread (quartiles) over its replays."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / len(calls))
    low, middle, high = statistics.quantiles(times[3:], n=4)
    return middle, (high - low) / middle


def copy_bandwidth() -> float:
    """Bytes read and written per second by a device-to-device copy of 1 GiB."""
    a = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / graph_seconds([lambda: b.copy_(a)])[0]


def weight(n: int, k: int, bits: int, group: int, grid: str, seed: int) -> Any:
    """A random packed weight on the GPU."""
    from effllm.runtime.formats import bipolar

    gen = torch.Generator(device="cuda").manual_seed(seed)
    g = bipolar.groups(k, group)
    codes = torch.randint(0, 2**bits, (n, bipolar.padded(k, group)), generator=gen, dtype=torch.uint8, device="cuda")
    scale = torch.exp2(torch.rand(n, g, generator=gen, device="cuda") * 4 - 10).half()
    low = (-scale * 2**bits).half() if grid == "affine" else None
    return bipolar.make(codes, scale, low, k=k, bits=bits, group=group, grid=grid)


def checker(packed: Any, x: Tensor, act: str = "a16") -> Callable[[Any], tuple[float, float]]:
    """A function of a configuration: relative errors of the Triton kernel and of plain torch in x's dtype against fp64."""
    from effllm.kernels.triton import launch
    from effllm.lowering.bipolar_linear import quantize_activation
    from effllm.runtime.formats import bipolar
    from effllm.runtime.layouts import words

    a, t = packed.attrs, words.repack(packed)
    zero = bipolar.zero_point(a["bits"], a["grid"], a["source_bits"])
    xq, xs = quantize_activation(x) if act == "a8" else (x, None)
    w = bipolar.unpack(packed, torch.float64)
    exact = (xq.double() if xs is None else xq.double() * xs.double()) @ w.t()
    rounded = exact.to(x.dtype) if act == "a8" else x @ w.to(x.dtype).t()
    size = exact.norm()
    plain = float((rounded.double() - exact).norm() / size)

    def check(config: Any) -> tuple[float, float]:
        out = torch.full((x.shape[0], packed.shape[0]), float("nan"), dtype=x.dtype, device=x.device)
        y = launch.linear(
            xq, xs, t["codes"], t["scale"], t.get("minimum"), None,
            n=packed.shape[0], bits=a["bits"], group=a["group"], zero=zero, dtype=x.dtype, config=config, out=out,
        )  # fmt: skip
        return float((y.double() - exact).norm() / size), plain

    return check


def verify() -> list[dict[str, Any]]:
    """Every width, grid and kernel against fp64; raises where the kernel errs more than twice as much as plain torch."""
    from benchmarks.gpu_tuning import problem_of, right
    from effllm.kernels.triton.choose import TritonTuning

    rows = []
    half, brain = torch.float16, torch.bfloat16
    cases = ((1, 32, "symmetric", brain), (2, 128, "affine", half), (17, 64, "integer", brain), (129, 0, "affine", half))
    for bits in range(1, 9):
        for m, group, grid, dtype in cases:
            packed = weight(1000, 1056 if group == 32 else 1024, bits, group, grid, bits)
            check = checker(packed, torch.randn(m, packed.shape[1], device="cuda").to(dtype))
            ranked = TritonTuning().ranked(problem_of(*packed.shape, bits, m, group=group, affine=grid == "affine"))
            for kind in dict.fromkeys(tiles.kind for _, tiles in ranked):
                tiles = next(tiles for _, tiles in ranked if tiles.kind == kind)
                found = check(tiles)
                if not right(found):
                    raise SystemExit(f"wrong result: {tiles}, m={m} w{bits} g{group} {grid}: {found[0]:.2e}, plain torch {found[1]:.2e}")
                rows.append({"bits": bits, "m": m, "group": group, "grid": grid, "kind": kind, "error": found[0], "plain": found[1]})
    return rows


def l2_bytes() -> int:
    """The L2 cache of this GPU."""
    from effllm.autotune import machines

    return int(machines.gpu("cuda")["l2"])


def time_shape(n: int, k: int, bits: int, m: int, budget_s: float, copy: float, act: str = "a16") -> dict[str, Any]:
    """Tune within a budget, then time the winner, the model's first choice and the peers in turns; predicted and measured stand side by side."""
    from benchmarks.gpu_tuning import GROUP, problem_of, tune_and_compare
    from effllm.autotune import use
    from effllm.autotune.store import open_store
    from effllm.lowering.bipolar_linear import provider

    problem = problem_of(n, k, bits, m, act)
    ours = provider(problem.op, "triton")
    row = tune_and_compare(problem, ours, open_store(), budget_s, None, peers(n, k, bits, m, act))
    use.forget()
    row |= {"n": n, "k": k, "m": m, "bits": bits, "group": GROUP, "act": act, "chosen": use.choose(ours, problem).note}
    return row | {"of_copy": row["gb_s"] * 1e9 / copy if "gb_s" in row else None}


def peers(n: int, k: int, bits: int, m: int, act: str) -> dict[str, Callable[[int], Any]]:
    """Calls on the i-th of several weights: dense bf16, and where they take the problem gemlite and the int4 kernel of torch."""
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    dense = [torch.randn(n, k, device="cuda", dtype=x.dtype) for _ in range(copies(2 * n * k, l2_bytes()))]
    found: dict[str, Callable[[int], Any]] = {"dense_bf16": lambda i: torch.nn.functional.linear(x, dense[i % len(dense)])}
    if act == "a16" and importlib.util.find_spec("gemlite") is not None:
        found["gemlite"] = gemlite(n, k, bits, m)
    if act == "a16" and bits == 4 and torch.version.cuda:
        found["tinygemm"] = tinygemm(n, k, x)
    return found


def gemlite(n: int, k: int, bits: int, m: int) -> Callable[[int], Any]:
    """gemlite's kernel on the same problem in fp16."""
    from gemlite.core import DType, GemLiteLinear

    from benchmarks.gpu_tuning import GROUP

    layers = []
    for _ in range(copies(n * k * bits // 8, l2_bytes())):
        layer = GemLiteLinear(W_nbits=bits, group_size=GROUP, in_features=k, out_features=n, input_dtype=DType.FP16, output_dtype=DType.FP16)
        groups = (n * k // GROUP, 1)
        codes = torch.randint(0, 2**bits, (n, k), device="cuda", dtype=torch.uint8)
        layer.pack(codes, torch.rand(groups, device="cuda").half(), torch.full(groups, 2.0 ** (bits - 1), device="cuda").half(), None)
        layers.append(layer)
    x = torch.randn(m, k, device="cuda", dtype=torch.float16)
    return lambda i: layers[i % len(layers)](x)


def tinygemm(n: int, k: int, x: Tensor) -> Callable[[int], Any]:
    """torch's int4 kernel, the one torchao's int4 weight-only uses."""
    from benchmarks.gpu_tuning import GROUP

    weights = []
    for _ in range(copies(n * k // 2, l2_bytes())):
        codes = torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8)
        weights.append(torch._convert_weight_to_int4pack(codes, 8))
    scales = torch.rand(k // GROUP, n, 2, device="cuda", dtype=torch.bfloat16)
    return lambda i: torch._weight_int4pack_mm(x, weights[i % len(weights)], GROUP, scales)


def versions() -> dict[str, Any]:
    """Hardware and software of this run."""
    import triton

    p = torch.cuda.get_device_properties(0)
    return {
        "gpu": p.name, "sms": p.multi_processor_count, "l2_bytes": l2_bytes(), "memory_bytes": p.total_memory, "capability": f"{p.major}.{p.minor}",
        "torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip, "triton": triton.__version__,
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """A row in one line."""
    at = f"m={row['m']} {row['n']}x{row['k']} w{row['bits']}{row['act']}"
    if "tuned_us" not in row:
        return f"{at}: not timed, {row['refused']}"
    others = ", ".join(f"{name} {row[f'{name}_us']:.1f}" for name in ("dense_bf16", "gemlite", "tinygemm") if f"{name}_us" in row)
    return (
        f"{at}: {row['tuned_us']:.2f} us (quartiles {row['tuned_spread_us']:.2f} apart), {row['gb_s']:.0f} GB/s, {row['of_copy']:.0%} of copy, "
        f"{row['of_bound']:.0%} of bound, predicted {row['predicted_us']:.2f}, model's first {row['first_us']:.2f}, {row['trials']} trials, {others}"
    )


def main(argv: list[str] | None = None) -> int:
    """Run everything and write one JSON file under benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 32768], help="tokens of the timed caches")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of tuning per problem; what was measured before is not measured again")
    parser.add_argument("--predict", nargs="?", const="cuda:90", metavar="CLASS", help="print the cost model's figures and measure nothing")
    args = parser.parse_args(argv)
    if args.predict:
        from benchmarks import gpu_caches
        from benchmarks.gpu_tuning import print_predictions

        print_predictions(args.predict)
        gpu_caches.print_predictions(args.predict)
        return 0
    if not torch.cuda.is_available():
        print("no GPU: nothing measured")
        return 0
    from benchmarks import gpu_caches

    report: dict[str, Any] = {"machine": versions(), "verified": verify() + gpu_caches.verify(), "rows": [], "caches": []}
    report["verified"] += [gpu_caches.captured(spec) for spec in gpu_caches.PACKED]
    copy = copy_bandwidth()
    report["machine"]["copy_gb_s"] = copy / 1e9
    print(f"{report['machine']['gpu']}: {len(report['verified'])} results verified, copy {copy / 1e9:.0f} GB/s")
    path = args.json or RESULTS / f"gpu-{report['machine']['gpu'].lower().replace(' ', '-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for tokens in args.contexts:
        report["caches"] += gpu_caches.timed(tokens, graph_seconds, lambda nbytes: copies(nbytes, l2_bytes()))
        path.write_text(json.dumps(report, indent=1) + "\n")
        for row in report["caches"][-len(gpu_caches.SPECS) :]:
            print(f"{row['spec']} {tokens} tokens: {row['us']:.1f} us, {row['times']:.2f}x dense, predicted {row['predicted_us']:.1f}", flush=True)
    for m in args.rows:
        for n, k in SHAPES:
            for bits, act in [(b, "a16") for b in BITS] + [(4, "a8")]:
                row = time_shape(n, k, bits, m, args.budget, copy, act)
                report["rows"].append(row)
                path.write_text(json.dumps(report, indent=1) + "\n")  # what was measured stays if the session ends
                print(line(row), flush=True)
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
