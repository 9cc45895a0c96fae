"""How good the tuner is: against every configuration, against a random search, and how well the cost model ranks.

    python -m benchmarks.tuner cpu          CPU kernels, real times: benchmarks/results/tuner-cpu.json
    python -m benchmarks.tuner control      three CPU problems, a quarter of a random search's trials: tuner-control.json
    python -m benchmarks.tuner simulated    the Triton space on a simulated device: tuner-simulated.json

The simulated device is the cost model with each configuration's time off by random, fixed factors: one per value of each field, and
one of its own. That shows how the search behaves on a space of hundreds whose model is wrong by so much; it says nothing about a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from effllm.autotune import search, space
from effllm.autotune.cost import Prediction
from effllm.autotune.fingerprint import Environment
from effllm.autotune.key import Key
from effllm.autotune.measure import Outcome, Session, Timing
from effllm.autotune.search import Result, Trial
from effllm.autotune.store import Store
from effllm.autotune.worker import Worker
from effllm.lowering import providers
from effllm.lowering.op import YES, Config, Problem, Provider, Verdict

SMOL = ((960, 576), (576, 576), (3072, 576), (576, 1536))  # (N, K) of SmolLM2-135M, merged
SEEDS = 20
CONTROL = 64  # trials of the random search on the simulated device
GOOD = 1.01  # of the best: within the noise of a measurement


def cpu_problems() -> list[Problem]:
    """Shapes of the demo model for decoding and for prompts of two lengths."""
    return [
        Problem("bipolar_linear_a8" if act == "a8" else "bipolar_linear", n, k, 4, 32, True, act, m, torch.bfloat16)
        for act in ("a16", "a8") for m in (1, 16, 512) for n, k in SMOL
    ]  # fmt: skip


def controls(found: Result, every: Result, seeds: int = SEEDS) -> dict[str, Any]:
    """The tuner against random orders of the same times: trials of each until a result within 1 % of what the control ends with."""
    times = {space.text_of(t.config): t.seconds for t in every.trials if t.seconds is not None}
    best = min(times.values())
    ours = found.reached(best * GOOD)
    theirs = []
    for seed in range(seeds):
        order = sorted(times)
        random.Random(seed).shuffle(order)
        theirs.append(next(i for i, c in enumerate(order, start=1) if times[c] <= best * GOOD))
    return {"best_us": best * 1e6, "tuner_trials_to_best": ours, "random_trials_to_best": statistics.median(theirs)}


def cpu() -> list[dict[str, Any]]:
    """Every configuration measured once by worker; the tuner then walks the same measurements, as a resumed run does."""
    rows, pairs = [], []
    with tempfile.TemporaryDirectory() as folder, Worker() as worker:
        store = Store(folder)
        for problem in cpu_problems():
            provider, _ = providers.select(problem)
            every = search.exhaustive(provider, problem, store, worker)
            if every.best is None or every.first is None or every.first.seconds is None or every.best.seconds is None:
                rows.append({"device": "cpu", "problem": name(problem), "not measured": every.stopped})
                continue
            found = search.tune(provider, problem, store, 1e6, worker)
            assert found.best is not None and found.best.seconds is not None
            pairs += [(t.predicted, t.seconds) for t in every.trials if t.seconds is not None]
            rows.append(
                {
                    "device": "cpu", "problem": name(problem), "configs": len(every.trials), "trials": len(found.trials),
                    "share_of_best": every.best.seconds / found.best.seconds, "first_gap": every.first.seconds / every.best.seconds - 1,
                    "spearman": every.spearman, "bound_share": every.bound / every.best.seconds,
                }
                | controls(found, every)
            )  # fmt: skip
    if len(pairs) > 3:
        gaps = [r["first_gap"] for r in rows if "first_gap" in r]
        rows.append({"device": "cpu", "problem": "all", "spearman": space.spearman(pairs), "first_gap": statistics.median(gaps), "configs": len(pairs)})
    return rows


def control() -> list[dict[str, Any]]:
    """Three CPU problems: the tuner's winner after a quarter of the trials against those of random searches.

    Every configuration is measured once, both walk these times, and all winners are then timed again in turns: that time decides.
    """
    rows = []
    shapes = (("a8", 1, 4096, 4096), ("a16", 16, 3072, 576), ("a8", 64, 4096, 4096))
    with tempfile.TemporaryDirectory() as folder, Worker() as worker:
        store = Store(folder)
        for act, m, n, k in shapes:
            problem = Problem("bipolar_linear_a8" if act == "a8" else "bipolar_linear", n, k, 4, 32, True, act, m, torch.bfloat16)
            provider, _ = providers.select(problem)
            every = search.exhaustive(provider, problem, store, worker)
            times = {space.text_of(t.config): t for t in every.trials if t.seconds is not None}
            if every.stopped != "all tried" or not times:
                rows.append({"device": "cpu", "problem": name(problem), "not measured": every.stopped})
                continue
            found = search.tune(provider, problem, store, 1e6, worker)
            trials = min(16, len(times))
            quarter = [t for t in found.trials[: trials // 4] if t.seconds is not None]
            winners = [min(quarter, key=_seconds)]
            for seed in range(SEEDS):
                order = sorted(times)
                random.Random(seed).shuffle(order)
                winners.append(min((times[c] for c in order[:trials]), key=_seconds))
            distinct = {space.text_of(t.config): t.config for t in winners}
            again = worker.time(provider, problem, list(distinct.values()))
            if again.refused or again.failed:
                rows.append({"device": "cpu", "problem": name(problem), "not measured": again.refused or str(again.failed)})
                continue
            timed = dict(zip(distinct, (t.seconds for t in again.timings), strict=True))
            ours, *theirs = (timed[space.text_of(t.config)] for t in winners)
            rows.append(
                {
                    "device": "cpu", "problem": name(problem), "configs": len(times), "tuner_trials": trials // 4, "random_trials": trials,
                    "tuner_us": ours * 1e6, "random_us": statistics.median(theirs) * 1e6,
                    "at_least_as_good": sum(ours <= t * GOOD for t in theirs) / SEEDS, "spearman": every.spearman,
                    "first_us": every.first.seconds * 1e6 if every.first and every.first.seconds else None,
                    "tuner_config": dict(winners[0].config), "best_config": dict(min(times.values(), key=_seconds).config),
                }
            )  # fmt: skip
    return rows


def _seconds(trial: Trial) -> float:
    assert trial.seconds is not None
    return trial.seconds


class TritonSpace:
    """The Triton kernels' configurations and cost model, which need neither Triton nor a GPU."""

    def __init__(self, seed: int, error: float) -> None:
        from effllm.kernels.triton.choose import TritonTuning

        self._tuning, self._seed, self._error = TritonTuning("cuda:90"), seed, error

    def configs(self, problem: Problem) -> Iterator[Config]:
        """All candidates."""
        yield from self._tuning.configs(problem)

    def legal(self, problem: Problem, config: Config) -> Verdict:
        """Whether the H200 takes it."""
        return self._tuning.legal(problem, config)

    def predict(self, problem: Problem, config: Config) -> Prediction:
        """The cost model, but for its bound: the device's random factors would beat it, and a search stops near a bound."""
        return dataclasses.replace(self._tuning.predict(problem, config), bound=0.0)

    def first(self, problem: Problem) -> Config:
        """The cheapest."""
        return min(self.configs(problem), key=lambda c: self.predict(problem, c).seconds)

    def real(self, problem: Problem, config: Config) -> float:
        """The simulated device: each value of each field, and each configuration, is off by a fixed factor."""
        factor = 1.0
        for part in [*(f"{f}={v}" for f, v in config.items()), space.text_of(config)]:
            factor *= math.exp(random.Random(f"{self._seed} {problem.m} {problem.n} {part}").gauss(0, self._error))
        return self.predict(problem, config).seconds * factor


class Simulated:
    """A runner over `TritonSpace.real`."""

    def __init__(self, device: TritonSpace) -> None:
        self._device = device

    def check(self, provider: Provider, problem: Problem, config: Config, timeout: float | None = None) -> Outcome:
        """Always right."""
        return Outcome("ok")

    def time(self, provider: Provider, problem: Problem, configs: Sequence[Config], timeout: float | None = None) -> Session:
        """Looked up."""
        return Session(tuple(Timing(self._device.real(problem, c), 0.0, 1) for c in configs))


SIMULATED = ((1, 4096, 4096), (16, 14336, 4096), (1, 6144, 4096))  # (M, N, K)


def simulated() -> list[dict[str, Any]]:
    """The tuner's best after CONTROL / 4 trials against a random search's after CONTROL, on three problems and two sizes of error."""
    return [simulate(m, n, k, error) for error in (0.05, 0.15) for m, n, k in SIMULATED]


def simulate(m: int, n: int, k: int, error: float, seeds: int = SEEDS) -> dict[str, Any]:
    """One problem on `seeds` simulated devices whose model is off by factors of log-standard deviation `error`."""
    here = Environment({"kind": "simulated"}, {"model error": error})
    problem = Problem("bipolar_linear", n, k, 4, 128, False, "a16", m, torch.float16)
    ours, theirs, shares, trials, ranks, count = [], [], [], [], [], 0
    for seed in range(seeds):
        device = TritonSpace(seed, error)
        provider = Provider("simulated", problem.op, "cpu", "words", lambda p: YES, lambda *a, **k: None, device)
        with tempfile.TemporaryDirectory() as folder:
            key = Key(problem.op, "simulated", "none", {"n": n, "k": k}, m)
            found = search.tune(provider, problem, Store(Path(folder) / "t"), 1e6, Simulated(device), key=key, environment=here)
        configs = list(device.configs(problem))
        times = [device.real(problem, c) for c in configs]
        count, best = len(configs), min(times)
        random.Random(seed).shuffle(times)
        ours.append(best / min(t.seconds for t in found.trials[: CONTROL // 4] if t.seconds is not None))
        theirs.append(best / min(times[:CONTROL]))
        shares.append(best / min(t.seconds for t in found.trials if t.seconds is not None))
        trials.append(len(found.trials))
        ranks.append(space.spearman([(device.predict(problem, c).seconds, device.real(problem, c)) for c in configs]))
    return {
        "device": "simulated", "problem": name(problem), "error": error, "configs": count, "spearman": statistics.median(ranks),
        f"tuner_share_after_{CONTROL // 4}": statistics.median(ours), f"random_share_after_{CONTROL}": statistics.median(theirs),
        "at_least_as_good": sum(a >= b for a, b in zip(ours, theirs, strict=True)) / seeds,
        "as_good_within_1%": sum(a * GOOD >= b for a, b in zip(ours, theirs, strict=True)) / seeds,
        "mean_shares": [statistics.mean(ours), statistics.mean(theirs)],
        "trials": statistics.median(trials), "share_of_best": statistics.median(shares),
    }  # fmt: skip


def name(p: Problem) -> str:
    """A problem in a few words."""
    return f"{p.act} {p.m}x{p.k}x{p.n}"


def main() -> None:
    """Print and save the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cpu", "control", "simulated"])
    what = parser.parse_args().what
    timing.save(f"tuner-{what}", {"cpu": cpu, "control": control, "simulated": simulated}[what](), simulated=what == "simulated")


if __name__ == "__main__":
    main()
