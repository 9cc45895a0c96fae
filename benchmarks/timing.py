"""Timing that the CPU benchmarks share: interleaved rounds, medians, and results kept beside the machine's figures."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from effllm.autotune import machine

RESULTS = Path(__file__).parent / "results"


def interleaved(calls: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Median seconds of each call; the calls take turns, so that drift of the machine meets all of them."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(rounds):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            times[i].append(time.perf_counter() - start)
    return [statistics.median(t) for t in times]


def save(name: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Print the rows and write benchmarks/results/NAME.json."""
    for row in rows:
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine.describe() | more, "rows": rows}, indent=1) + "\n")
