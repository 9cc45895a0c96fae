"""What benchmarks/gpu.py tunes with: the search, worker and interleaved clock of `effllm tune`, and the cost model's figures without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from effllm.autotune import gpus, inputs, measure, search
from effllm.autotune.store import Store
from effllm.autotune.worker import Worker
from effllm.lowering.op import Config, Problem, Provider

GROUP = 128


def problem_of(n: int, k: int, bits: int, m: int | None, act: str = "a16", group: int = GROUP, affine: bool = False) -> Problem:
    """The problem of a linear with bf16 outputs."""
    return Problem("bipolar_linear_a8" if act == "a8" else "bipolar_linear", n, k, bits, group, affine, act, m, torch.bfloat16, "cuda")


def right(errors: tuple[float, float]) -> bool:
    """Whether a kernel errs at most twice as much as plain torch, plus the accumulator's share; NaN is wrong."""
    got, plain = errors
    return got <= 2 * plain + 2.0**-14


def tune_and_compare(
    problem: Problem, provider: Provider, store: Store, budget_s: float, runner: search.Runner | None, others: Mapping[str, Callable[[int], object]], *,
    seconds: float | None = None, slack: float | None = measure.SLACK, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """Search as `effllm tune` does, in a worker process unless a runner is given; then the winner, the model's first choice and `others` in turns.

    `others` take the number of a weight copy. Times and spreads (interquartile) in microseconds. Raises TuneError; SystemExit where nothing is right.
    """
    tuning = provider.tuning
    assert tuning is not None
    with contextlib.ExitStack() as stack:
        found = search.tune(provider, problem, store, budget_s, runner or stack.enter_context(Worker(seconds=seconds, slack=slack)), **more)
    if found.best is None:
        raise SystemExit(f"no configuration of {problem} computes a right result: {'; '.join(found.notes)}")
    operands = inputs.make(problem, provider.layout)
    configs = {"tuned": found.best.config, "first": tuning.first(problem)}

    def ours(config: Config) -> Callable[[int], object]:
        return lambda i: provider.call(*operands.args[i % len(operands.args)], problem=problem, config=config)

    calls = [*(ours(c) for c in configs.values()), *others.values()]
    session = measure.time_interleaved(calls, len(operands.args), device=problem.device, seconds=seconds, slack=slack)
    row: dict[str, Any] = {"config": dict(found.best.config), "bytes": operands.nbytes, "trials": len(found.trials), "new": found.measured}
    row |= {"stopped": found.stopped, "spearman": found.spearman, "refused": session.refused or None, "notes": found.notes}
    for name, timing in zip([*configs, *others], session.timings, strict=False):
        row |= {f"{name}_us": timing.seconds * 1e6, f"{name}_spread_us": timing.spread * 1e6}
    predicted = tuning.predict(problem, found.best.config)
    row |= {"predicted_us": predicted.seconds * 1e6, "bound_us": found.bound * 1e6}
    if session.timings:
        row |= {"gb_s": operands.nbytes / row["tuned_us"] / 1e3, "of_bound": row["bound_us"] / row["tuned_us"]}
    tried = [{"config": dict(t.config), "status": t.status, "us": t.seconds and t.seconds * 1e6, "predicted_us": t.predicted * 1e6} for t in found.trials]
    return row | {"tried": tried}


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
