"""Replays with a clock that only forwards move: exact times, skipped waits, percentiles, and the measured budget."""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.hf.engine import Engine
from effllm.hf.replay import choose_budget, percentiles, replay, summary
from effllm.hf.serving import Loop
from effllm.runtime.trace import Arrival
from tests.hf.tiny import tiny_llama


class Clock:
    """A forward takes 1 second and 0.1 for each of its tokens."""

    def __init__(self, monkeypatch) -> None:
        self.now, plain = 100.0, Engine.run

        def run(engine, pieces):
            self.now += 1 + 0.1 * sum(len(p.ids) for p in pieces)
            return plain(engine, pieces)

        monkeypatch.setattr(Engine, "run", run)

    def __call__(self) -> float:
        return self.now


def ids(n: int) -> Tensor:
    return torch.arange(n) % 50 + 3


def test_times_are_those_of_the_forwards(monkeypatch) -> None:
    loop = Loop(tiny_llama(torch.float32), budget=10, most=4, slots=200, eos_token_id=[])
    trace = [Arrival(0.0, 10, 3), Arrival(1.5, 18, 2), Arrival(1000.0, 5, 1)]
    log = replay(loop, trace, ids, Clock(monkeypatch))
    # 2.0: first prompt done. 4.0: a decode and 9 of the second. 6.0: the last decode and 9 more. 7.1: the second's last. 1001.5: the third, its wait skipped
    assert [[round(t, 6) for t in times] for times in log.tokens.values()] == [[2.0, 4.0, 6.0], [6.0, 7.1], [1001.5]]
    assert [(round(s, 6), d, p) for s, d, p in log.steps] == [(2.0, 0, 10), (2.0, 1, 9), (2.0, 1, 9), (1.1, 1, 0), (1.5, 0, 5)]
    found = summary(log)
    assert found["new_tokens"] == 6 and found["prompt_tokens"] == 33 and found["largest_prompt_part"] == 10 and abs(found["seconds"] - 1001.5) < 1e-6
    assert abs(found["time_between_tokens_s"]["max"] - 2.0) < 1e-6 and abs(found["time_to_first_token_s"]["max"] - 4.5) < 1e-6


def test_percentiles_are_nearest_ranks() -> None:
    assert percentiles([float(i) for i in range(1, 101)]) == {"p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}
    assert percentiles([3.0]) == {"p50": 3.0, "p90": 3.0, "p99": 3.0, "max": 3.0} and percentiles([])["p99"] is None


def test_the_budget_is_the_largest_within_the_slowdown(monkeypatch) -> None:
    clock = Clock(monkeypatch)
    # 5 decodes take 1.5 s; twice that allows 15 tokens more, and 12 is the largest multiple of 4
    assert choose_budget(tiny_llama(torch.float32), 5, 20, 300, 2.0, rounds=1, clock=clock) == 5 + 12
    assert choose_budget(tiny_llama(torch.float32), 5, 20, 300, 1.01, rounds=1, clock=clock) == 5 + 4  # a prompt must move on
    assert choose_budget(tiny_llama(torch.float32), 5, 20, 300, 1e9, rounds=1, clock=clock) >= 5 + 256
