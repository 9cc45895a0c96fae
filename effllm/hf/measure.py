"""Timing: checked first, then interleaved round by round, reported as median and spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from effllm.autotune import machine
from effllm.errors import KernelError
from effllm.hf.cache import CompressedCache
from effllm.hf.static import StaticRunner
from effllm.hf.variants import Shape, Variant

CHECKED = 6  # decode steps compared before anything is timed
TOLERANCE = 0.15  # relative L2 error of centred logits; bf16 rounding through 30 layers gives 0.01 to 0.04, a wrong kernel about 1


@dataclass
class Times:
    """Seconds of each round: one decode run, one prefill. `peaks`: highest resident set of the process in each turn, bytes; None
    where the peak cannot be reset."""

    decode: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    peaks: list[int | None] = field(default_factory=list)

    @property
    def peak(self) -> int | None:
        """The highest of all turns; None where one of them has no figure."""
        known = [p for p in self.peaks if p is not None]
        return max(known) if known and len(known) == len(self.peaks) else None


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest value."""

    median: float
    low: float
    high: float


def spread(values: list[float]) -> Spread:
    """Median and range of a list."""
    return Spread(statistics.median(values), min(values), max(values))


def check(variant: Variant, ids: Tensor, shape: Shape) -> float:
    """Compare compiled decode and prefill with eager forwards of the same weights; returns the larger relative error of the logits.

    This is also the warm-up: both graphs are compiled here. Raises KernelError (E-KRN-RESULT) where the results differ.
    """
    runner = variant.runner
    with torch.no_grad():
        prompt = ids[:, : shape.prompt]
        logits = runner.start(prompt)
        tokens, outs = runner.decode(logits, shape.prompt, min(CHECKED, shape.tokens))
        teacher = torch.cat([prompt, torch.tensor([tokens], device=ids.device)], 1)
        want = _uncompiled(variant, teacher, shape.prompt)
        errors = {"decode": _error(torch.cat(outs), want)}
        # twice: the first call compiles, the second would show state left in the cache
        got = [runner.prefill(ids[:, : shape.prefill])[0] for _ in range(2)][-1]
        # a prompt sees itself exact, whatever the cache
        whole = variant.model(input_ids=ids[:, : shape.prefill], use_cache=False, logits_to_keep=1).logits[0]
        errors["prefill"] = _error(got, whole)
    for part, value in errors.items():
        if not value <= TOLERANCE:  # so written, it holds for NaN too
            cause = f"{variant.name}: compiled and eager logits of {part} differ by {value:.3g} (relative), {TOLERANCE} is allowed"
            raise KernelError("E-KRN-RESULT", cause, "leave this variant out, and report its recipe with `effllm doctor --json`")
    return max(errors.values())


def _uncompiled(variant: Variant, teacher: Tensor, prompt: int) -> Tensor:
    """Logits behind the prompt of a teacher-forced run in eager mode, through a cache of the variant's format if it has one."""
    if variant.runner.kv is None:
        out: Tensor = variant.model(input_ids=teacher, use_cache=False).logits[0, prompt:]
        return out
    cache = CompressedCache(variant.model, variant.runner.kv)
    variant.model(input_ids=teacher[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
    steps = [variant.model(input_ids=teacher[:, i : i + 1], past_key_values=cache, use_cache=True).logits[0] for i in range(prompt, teacher.shape[1])]
    return torch.cat(steps)


def measure(variants: list[Variant], ids: Tensor, shape: Shape, rounds: int, tick: Callable[[], None] = lambda: None) -> dict[str, Times]:
    """Round-robin over the variants, `rounds` times: decode `shape.tokens` tokens, then prefill. `tick` after each variant's turn."""
    times = {v.name: Times() for v in variants}
    for _ in range(rounds):
        for v in variants:
            fresh = machine.reset_peak_rss()
            times[v.name].decode.append(_decode_seconds(v.runner, ids[:, : shape.prompt], shape.tokens))
            times[v.name].prefill.append(_prefill_seconds(v.runner, ids[:, : shape.prefill]))
            times[v.name].peaks.append(machine.peak_rss() if fresh else None)
            tick()
    return times


def _decode_seconds(runner: StaticRunner, prompt: Tensor, count: int) -> float:
    logits = runner.start(prompt)
    _wait(runner)
    start = time.perf_counter()
    runner.decode(logits, prompt.shape[1], count)
    _wait(runner)
    return time.perf_counter() - start


def _prefill_seconds(runner: StaticRunner, ids: Tensor) -> float:
    _wait(runner)
    start = time.perf_counter()
    int(runner.prefill(ids)[0].argmax())  # the first token is chosen: this is the time to first token too
    return time.perf_counter() - start


def _wait(runner: StaticRunner) -> None:
    if runner.device.type == "cuda":
        torch.cuda.synchronize(runner.device)


def _error(got: Tensor, want: Tensor) -> float:
    a, b = (t.double() - t.double().mean(-1, keepdim=True) for t in (got, want))
    return float((a - b).norm() / b.norm().clamp_min(1e-30))
