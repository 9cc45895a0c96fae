"""Gumbel noise draws without replacement: tokens, and sequences level by level."""

from __future__ import annotations

import torch

from effllm.runtime.speculation import gumbel
from tests.runtime.speculation.chi import LIMIT, deviation

P = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)


def test_the_order_is_that_of_draws_without_replacement() -> None:
    stream, counts, want = torch.Generator().manual_seed(1), torch.zeros(4, 4), torch.zeros(4, 4)
    for _ in range(5000):
        a, b = gumbel.top(P.log() + gumbel.noise((4,), stream), 2)
        counts[a, b] += 1
    for a in range(4):
        for b in set(range(4)) - {a}:
            want[a, b] = P[a] * P[b] / (1 - P[a])
    assert deviation(counts, want) < LIMIT


def test_tokens_that_cannot_come_are_left_out() -> None:
    p = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    assert gumbel.top(p.log() + gumbel.noise((3,), torch.Generator().manual_seed(0)), 3) == [1]


def test_children_are_moved_so_that_their_largest_is_the_parent() -> None:
    stream = torch.Generator().manual_seed(2)
    for scale in (1e-3, 1.0, 30.0, 300.0):  # the plain formula overflows at the last
        raw = scale * torch.randn(50, generator=stream, dtype=torch.float64)
        for parent in (-5.0, 0.0, 3 * scale):
            moved = gumbel.conditioned(parent, raw)
            assert float(moved.max()) == parent and moved.isfinite().all()
            assert torch.equal(moved.argsort(), raw.argsort()) or bool((moved.sort().values.diff() >= 0).all())
    raw = torch.randn(50, generator=stream, dtype=torch.float64)
    plain = -torch.log(torch.exp(torch.tensor(-0.7, dtype=torch.float64)) - torch.exp(-raw.max()) + torch.exp(-raw))
    assert torch.allclose(gumbel.conditioned(0.7, raw), plain, atol=1e-12)
    gone = gumbel.conditioned(1.0, torch.tensor([0.3, -torch.inf], dtype=torch.float64))
    assert gone.tolist() == [1.0, -torch.inf]
