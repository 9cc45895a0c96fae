"""A device that exists only as a formula, and a space of a few hundred configurations on it: searches without a clock."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from effllm.autotune.cost import Prediction
from effllm.autotune.measure import Outcome, Session, Timing
from effllm.lowering.op import YES, Config, Problem, Provider, Verdict

PATHS, TILES, STAGES = ("gemv", "gemm"), (16, 32, 64, 128, 256), (1, 2, 3, 4)


def true_seconds(config: Config) -> float:
    """A bowl in (tile, stages) per path; best: gemm, 64, 3 with 20 us."""
    tile, stages = TILES.index(config["tile"]), STAGES.index(config["stages"])
    base = 20.0 if config["path"] == "gemm" else 26.0
    return 1e-6 * base * (1 + 0.2 * abs(tile - 2) + 0.15 * abs(stages - 2))


class BowlTuning:
    """Predicts the true time times a factor in 1 +- `error` that depends on the configuration alone."""

    def __init__(self, error: float = 0.0, bound: float = 10e-6, without: str = "") -> None:
        self.error, self.bound, self.without = error, bound, without

    def configs(self, problem: Problem) -> Iterator[Config]:
        yield from ({"path": p, "tile": t, "stages": s} for p in PATHS if p != self.without for t in TILES for s in STAGES)

    def legal(self, problem: Problem, config: Config) -> Verdict:
        return YES

    def predict(self, problem: Problem, config: Config) -> Prediction:
        noise = random.Random(str(sorted(config.items()))).uniform(-1, 1)
        return Prediction(1.0, 1.0, 1.0, true_seconds(config) * (1 + self.error * noise), self.bound)

    def first(self, problem: Problem) -> Config:
        return min(self.configs(problem), key=lambda c: self.predict(problem, c).seconds)


def provider(tuning: BowlTuning) -> Provider:
    return Provider("simulated", "bipolar_linear", "cpu", "planes", lambda p: YES, lambda *a, **k: None, tuning)


class Simulated:
    """A runner that looks times up. `status` gives the outcome of a check; each check and each timing advances `now` by a second."""

    def __init__(self, seconds: Callable[[Config], float] = true_seconds, status: Callable[[Config], str] = lambda c: "ok") -> None:
        self.seconds, self.status = seconds, status
        self.checked: list[Config] = []
        self.refuse = 0
        self.now = 0.0

    def check(self, provider: Provider, problem: Problem, config: Config, timeout: float | None = None) -> Outcome:
        self.checked.append(config)
        self.now += 1.0
        status = self.status(config)
        return Outcome(status, "" if status == "ok" else "made up")

    def time(self, provider: Provider, problem: Problem, configs: Sequence[Config], timeout: float | None = None) -> Session:
        self.now += 1.0
        if self.refuse:
            self.refuse -= 1
            return Session((), "other processes keep 2.0 cores busy")
        return Session(tuple(Timing(self.seconds(c), 1e-7, 20) for c in configs))
