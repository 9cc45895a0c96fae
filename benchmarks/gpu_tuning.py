"""What benchmarks/gpu.py tunes with: verified timings kept in the tuning store, and the cost model's figures without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from effllm.autotune import gpus
from effllm.autotune.fingerprint import Environment
from effllm.autotune.key import Key
from effllm.autotune.measurement import Measurement
from effllm.autotune.store import Store
from effllm.lowering.op import Problem

GROUP = 128
REPEATS = 20  # replays of a graph


def problem_of(n: int, k: int, bits: int, m: int | None, act: str = "a16", group: int = GROUP, affine: bool = False) -> Problem:
    """The problem of a linear with bf16 outputs."""
    return Problem("bipolar_linear_a8" if act == "a8" else "bipolar_linear", n, k, bits, group, affine, act, m, torch.bfloat16, "cuda")


def right(errors: tuple[float, float]) -> bool:
    """Whether a kernel errs at most twice as much as plain torch, plus the accumulator's share; NaN is wrong."""
    got, plain = errors
    return got <= 2 * plain + 2.0**-14


def measure(
    problem: Problem, ranked: list[tuple[float, Any]], check: Callable[[Any], tuple[float, float]], clock: Callable[[Any], tuple[float, float]],
    store: Store, environment: Environment,
) -> list[dict[str, Any]]:  # fmt: skip
    """Verify and time configurations, each kept in the store: the timed ones, in the order given.

    A configuration that this software is known to compute wrongly, or not at all, is not tried again. `clock` returns seconds and relative spread.
    """
    key = Key.of(problem, "triton")
    known, timed = store.results(key, environment), []
    for predicted, tiles in ranked:
        base = Measurement(key, tiles.config(), "wrong", environment, predicted=predicted)
        if base.config_text in known and known[base.config_text].status != "ok":
            continue
        try:
            if right(check(tiles)):
                seconds, spread = clock(tiles)
                base = replace(base, status="ok", seconds=seconds, spread=seconds * spread, n=REPEATS)
                timed.append({"config": tiles.config(), "us": seconds * 1e6, "spread": spread, "predicted_us": predicted * 1e6})
        except (RuntimeError, triton_errors()) as error:  # of the compiler or the launch; an illegal access ends the next call
            short = "out of memory" in str(error).lower() or "out of resource" in str(error).lower()
            base = replace(base, status="oom" if short else "error")
        store.append(base)
    return timed


def triton_errors() -> type[Exception]:
    """What Triton raises for a kernel that it cannot compile or fit."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return RuntimeError
    found: type[Exception] = TritonError
    return found


def predict(name: str) -> list[dict[str, Any]]:
    """The cost model's figures of the first choice for one row of 8192x8192 on a class of gpus.CLASSES: predictions, nothing is run."""
    from effllm.kernels.triton.choose import TritonTuning

    gpu, tuning, rows = gpus.by_class(name), TritonTuning(name), []
    for bits in (4, 2, 1):
        problem = problem_of(8192, 8192, bits, 1)
        found = tuning.predict(problem, tuning.first(problem))
        nbytes = 8192 * 8192 * (bits / 8 + 2 / GROUP)
        share, bound = nbytes / found.seconds / gpu.bandwidth, found.bound / found.seconds
        row = {"bits": bits, "us": found.seconds * 1e6, "of_bandwidth": share, "of_bound": bound, "config": tuning.first(problem)}
        rows.append(row | {"crossovers": tuning.crossovers(problem.at(None))})
    return rows


def print_predictions(name: str) -> None:
    """The figures of `predict`, said to be predictions."""
    gpu = gpus.by_class(name)
    print(f"predicted, not measured: {gpu.name} by its data sheet ({gpu.bandwidth / 1e12:.2f} TB/s, {gpu.sms} multiprocessors), one bf16 row, group {GROUP}")
    for row in predict(name):
        paths = ", ".join(f"{path} from {m}" for m, path in row["crossovers"])
        print(f"w{row['bits']} 8192x8192: {row['us']:.2f} us, {row['of_bandwidth']:.0%} of bandwidth, {row['of_bound']:.0%} of bound; rows: {paths}")
