"""Packed GEMV and GEMM on a CUDA or ROCm GPU: verified, tuned over the cost model's best candidates, timed with a cold L2 cache.

Every timing is a CUDA graph of one call per weight copy; the copies together exceed four times the L2 cache, so each call reads
its weight from memory. Each is kept in the tuning store, wrong results and failures as such. Achieved bandwidth (packed bytes over
time) stands next to the device's measured copy bandwidth, and the time next to the bound that no kernel can beat.

    python -m benchmarks.gpu [--json FILE] [--rows 1 16] [--top 12]
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


def time_shape(n: int, k: int, bits: int, m: int, top: int, copy: float, act: str = "a16") -> dict[str, Any]:
    """Tune over the `top` cheapest candidates and time the best; predicted and measured times stand side by side."""
    from benchmarks.gpu_tuning import GROUP, measure, problem_of
    from effllm.autotune import fingerprint, use
    from effllm.autotune.store import open_store
    from effllm.kernels.triton import launch
    from effllm.kernels.triton.choose import TritonTuning
    from effllm.lowering.bipolar_linear import provider, quantize_activation
    from effllm.runtime.formats import bipolar
    from effllm.runtime.layouts import words

    packed = weight(n, k, bits, GROUP, "symmetric", 0)
    first = words.repack(packed)
    nbytes = sum(t.numel() * t.element_size() for t in first.values())
    tensors = [first] + [{key: t.clone() for key, t in first.items()} for _ in range(copies(nbytes, l2_bytes()) - 1)]
    x: Tensor = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    xq, xs = quantize_activation(x) if act == "a8" else (x, None)
    zero = bipolar.zero_point(bits, "symmetric")

    def clock(tiles: Any) -> tuple[float, float]:
        def call(t: dict[str, Tensor]) -> Tensor:
            return launch.linear(xq, xs, t["codes"], t["scale"], None, None, n=n, bits=bits, group=GROUP, zero=zero, dtype=x.dtype, config=tiles)

        return graph_seconds([lambda t=t: call(t) for t in tensors])

    problem, tuning = problem_of(n, k, bits, m, act), TritonTuning()
    timed = measure(problem, tuning.ranked(problem)[:top], checker(packed, x, act), clock, open_store(), fingerprint.environment("cuda"))
    use.forget()
    if not timed:
        raise SystemExit(f"no configuration of {problem} computes a right result; `effllm cache` lists what was tried")
    best = min(timed, key=lambda row: row["us"])
    dense = [torch.randn(n, k, device="cuda", dtype=x.dtype) for _ in range(copies(2 * n * k, l2_bytes()))]
    dense_seconds, _ = graph_seconds([lambda w=w: torch.nn.functional.linear(x, w) for w in dense])
    rate = nbytes / best["us"] * 1e6
    bound = tuning.predict(problem, best["config"]).bound
    return {
        "n": n, "k": k, "m": m, "bits": bits, "group": GROUP, "act": act, "bytes": nbytes, **best, "first_choice_us": timed[0]["us"],
        "gb_s": rate / 1e9, "of_copy": rate / copy, "bound_us": bound * 1e6, "of_bound": bound * 1e6 / best["us"],
        "dense_bf16_us": dense_seconds * 1e6, "chosen": use.choose(provider(problem.op, "triton"), problem).note, "tuned": timed,
    }  # fmt: skip


def time_gemlite(n: int, k: int, bits: int, m: int) -> float | None:
    """Seconds of gemlite's kernel on the same problem in fp16, where it is installed."""
    if importlib.util.find_spec("gemlite") is None:
        return None
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
    return graph_seconds([lambda layer=layer: layer(x) for layer in layers])[0]


def time_tinygemm(n: int, k: int, m: int) -> float:
    """Seconds of torch's int4 kernel, the one torchao's int4 weight-only uses."""
    from benchmarks.gpu_tuning import GROUP

    inner = 8
    weights = []
    for _ in range(copies(n * k // 2, l2_bytes())):
        codes = torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8)
        weights.append(torch._convert_weight_to_int4pack(codes, inner))
    scales = torch.rand(k // GROUP, n, 2, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    return graph_seconds([lambda w=w: torch._weight_int4pack_mm(x, w, GROUP, scales) for w in weights])[0]


def versions() -> dict[str, Any]:
    """Hardware and software of this run."""
    import triton

    p = torch.cuda.get_device_properties(0)
    return {
        "gpu": p.name, "sms": p.multi_processor_count, "l2_bytes": l2_bytes(), "memory_bytes": p.total_memory, "capability": f"{p.major}.{p.minor}",
        "torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip, "triton": triton.__version__,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run everything and write one JSON file under benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--top", type=int, default=12, help="candidates of the cost model to time")
    parser.add_argument("--predict", nargs="?", const="cuda:90", metavar="CLASS", help="print the cost model's figures and measure nothing")
    args = parser.parse_args(argv)
    if args.predict:
        from benchmarks.gpu_tuning import print_predictions

        print_predictions(args.predict)
        return 0
    if not torch.cuda.is_available():
        print("no GPU: nothing measured")
        return 0
    report: dict[str, Any] = {"machine": versions(), "verified": verify(), "rows": []}
    copy = copy_bandwidth()
    report["machine"]["copy_gb_s"] = copy / 1e9
    print(f"{report['machine']['gpu']}: {len(report['verified'])} results verified, copy {copy / 1e9:.0f} GB/s")
    for m in args.rows:
        for n, k in SHAPES:
            for bits, act in [(b, "a16") for b in BITS] + [(4, "a8")]:
                row = time_shape(n, k, bits, m, args.top, copy, act)
                if act == "a16":
                    gemlite = time_gemlite(n, k, bits, m)
                    row["gemlite_us"] = None if gemlite is None else gemlite * 1e6
                    row["tinygemm_us"] = time_tinygemm(n, k, m) * 1e6 if bits == 4 and torch.version.cuda else None
                report["rows"].append(row)
                peers = ", ".join(f"{name} {row[f'{name}_us']:.1f}" for name in ("gemlite", "tinygemm") if row.get(f"{name}_us"))
                print(
                    f"m={m} {n}x{k} w{bits}{act}: {row['us']:.2f} us ±{row['spread']:.0%}, {row['gb_s']:.0f} GB/s, {row['of_copy']:.0%} of copy, "
                    f"{row['of_bound']:.0%} of bound, "
                    f"predicted {row['predicted_us']:.2f}, model's first {row['first_choice_us']:.2f}, dense bf16 {row['dense_bf16_us']:.1f} {peers}",
                    flush=True,
                )
    path = args.json or RESULTS / f"gpu-{report['machine']['gpu'].lower().replace(' ', '-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
