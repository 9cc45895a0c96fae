"""Low rank plus sparse: neutral settings, what the sparse part buys, and that each part has the size that was asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effllm.errors import WeightError
from effllm.solvers.lowrank.sparse import lost, sltrain
from effllm.solvers.lowrank.whitened import whitened
from effllm.solvers.moments import Moments, of_inputs


def problem(seed: int = 0) -> tuple[Tensor, Moments]:
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(500, 40, generator=gen).double() * torch.logspace(0, -1, 40).double()
    x = x @ (torch.eye(40) + 0.2 * torch.randn(40, 40, generator=gen)).double()
    return torch.randn(24, 40, generator=gen).double(), of_inputs(x)


def off(w: Tensor, z: Tensor, m: Moments) -> float:
    e = w - z
    return float(((e @ m.hessian) * e).sum())


def test_no_sparse_part_is_the_whitened_solution() -> None:
    w, m = problem()
    f, s = sltrain(w, 6, 0, m)
    assert int(s.count_nonzero()) == 0
    torch.testing.assert_close(f.dense(), whitened(w, 6, m).dense(), rtol=1e-6, atol=1e-6)


def test_everything_sparse_is_the_weight() -> None:
    w, m = problem()
    f, s = sltrain(w, 6, w.numel(), m)
    torch.testing.assert_close(f.dense() + s, w)


def test_more_nonzeros_lose_less() -> None:
    w, m = problem()
    losses = []
    for count in (0, 20, 60, 180):
        f, s = sltrain(w, 6, count, m)
        assert int(s.count_nonzero()) <= count and f.rank == 6
        losses.append(off(w, f.dense() + s, m))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.8 * losses[0]


def test_rounds_help_and_never_harm() -> None:
    w, m = problem()
    one, many = (sltrain(w, 6, 100, m, rounds=r) for r in (1, 8))
    assert off(w, many[0].dense() + many[1], m) < off(w, one[0].dense() + one[1], m)


def test_planted_sparse_entries_are_found() -> None:
    """Among inputs that are not correlated, so that an entry's residual stands out."""
    gen = torch.Generator().manual_seed(1)
    m = of_inputs(torch.randn(4000, 40, generator=gen).double())
    low = (torch.randn(24, 2, generator=gen) @ torch.randn(2, 40, generator=gen)).double()
    where = torch.zeros(24 * 40, dtype=torch.bool)
    where[torch.randperm(24 * 40, generator=gen)[:12]] = True
    spikes = where.view(24, 40) * 8.0
    f, s = sltrain(low + spikes, 2, 12, m, rounds=60, damp=0)
    assert torch.equal(s != 0, where.view(24, 40))
    assert off(low + spikes, f.dense() + s, m) < 1e-3 * off(low + spikes, low, m)


def test_channels_are_folded_into_the_second_stage() -> None:
    w, m = problem()
    losses = [off(w, whitened(w, 6, m).dense(), m)]
    for count in (1, 4, 12):
        f = lost(w, 6, count, m, damp=0)
        assert f.channels is not None and f.channels.unique().numel() == count and f.a.shape == (24, 6 + count)
        losses.append(off(w, f.dense(), m))
        # least squares over concat(B x, x[channels]): no other second stage does better
        reads = torch.cat([f.b, torch.eye(40).double()[f.channels]])
        best = torch.linalg.solve(reads @ m.hessian @ reads.t(), reads @ m.hessian @ w.t()).t()
        torch.testing.assert_close(f.a, best, rtol=1e-5, atol=1e-6)
    assert losses == sorted(losses, reverse=True)


def test_channels_that_complete_the_rank_are_exact() -> None:
    w, m = problem()
    f = lost(w, 10, 30, m)
    torch.testing.assert_close(f.dense(), w, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [0, -1, 35])
def test_channel_counts_that_make_no_sense(count: int) -> None:
    w, m = problem()
    with pytest.raises(WeightError) as caught:
        lost(w, 6, count, m)
    assert caught.value.code == "E-WGT-SPARSE"
    if count < 0:
        with pytest.raises(WeightError):
            sltrain(w, 6, count, m)
