"""When to stop drafting: bounds, the threshold's direction, and an oracle that beats every fixed length."""

from __future__ import annotations

import pytest
import torch

from effllm.errors import OptionError
from effllm.runtime.speculation.settings import Speculation
from effllm.runtime.speculation.stopping import Stopping


def drafted(threshold: float, estimates: list[float], least: int = 1, most: int = 8) -> int:
    rule = Stopping(threshold, least, most)
    for n, a in enumerate(estimates, 1):
        rule.saw(a)
        if not rule.go_on(n):
            return n
    raise AssertionError("the rule never stopped")


def test_bounds_and_thresholds() -> None:
    sure = [0.9] * 30
    assert drafted(0.0, sure, least=3) == 3 and drafted(1.0, sure) == 8
    assert [drafted(h, sure) for h in (0.1, 0.2, 0.3, 0.5)] == [2, 3, 4, 7]  # 1 - 0.9^n first above h
    assert drafted(0.3, [0.99, 0.99, 0.2, 0.99, *sure]) == 3
    assert drafted(0.3, [2.0, -1.0, *sure]) == 2  # estimates are clamped


def test_an_oracle_beats_every_fixed_length() -> None:
    """Runs of easy tokens that end somewhere: cost of a drafted token 0.2, of a target forward 1."""
    stream = torch.Generator().manual_seed(0)
    hard = torch.rand(4000, generator=stream) < torch.where(torch.rand(4000, generator=stream) < 0.5, 0.02, 0.5)

    def cost(plan: int | None) -> float:
        """Cost a token: a fixed length, or stop where the oracle sees a rejection."""
        at, spent, most = 0, 0.0, 8
        while at < len(hard) - most - 1:
            ahead = hard[at : at + most].tolist()
            good = ahead.index(True) if True in ahead else most
            if plan is None:
                rule, n = Stopping(0.5, 1, most), 0
                while True:
                    n += 1
                    rule.saw(0.0 if ahead[n - 1] else 1.0)
                    if not rule.go_on(n):
                        break
            else:
                n = plan
            spent += 0.2 * n + 1
            at += min(good, n) + 1
        return spent / at

    assert cost(None) < min(cost(k) for k in range(1, 9))


def test_settings_in_one_line() -> None:
    assert Speculation.parse("chain(tokens=8, stop=0.4, least=2)") == Speculation("chain", tokens=8, stop=0.4, least=2)
    assert Speculation.parse("constant(branching=3x2x1)").branching == (3, 2, 1)
    assert Speculation.parse("beam(width=4, depth=2)") == Speculation("beam", width=4, depth=2)
    assert Speculation.parse(None) == Speculation.parse(4) == Speculation.parse("chain")
    assert [Speculation.parse(s).nodes(2) for s in ("chain(tokens=5)", "constant(branching=3x2x1)", "beam(width=4, depth=3)")] == [3, 10, 9]
    assert [Speculation.parse(s).levels for s in ("chain(tokens=5)", "constant(branching=3x2x1)", "beam(width=4, depth=2)")] == [5, 3, 2]


@pytest.mark.parametrize(
    "text",
    ["tree", "chain(5)", "chain(width=3)", "chain(tokens=0)", "chain(tokens=x)", "chain(stop=1.5)", "constant(branching=2x0)", "chain(least=5)", "chain(", ""],
)
def test_settings_that_cannot_be(text: str) -> None:
    with pytest.raises(OptionError) as error:
        Speculation.parse(text)
    assert error.value.code == "E-OPT-SPECULATION"


def test_a_head_needs_a_threshold() -> None:
    with pytest.raises(OptionError, match="E-OPT-SPECULATION"):
        Speculation(head=object())
