"""ARMOR: every step is the exact optimum of its part, the loss only falls, and it ends below what the paper's own steps reach."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from effllm.errors import RecipeError, WeightError
from effllm.solvers.moments import Moments
from effllm.solvers.nm import armor, nm_mask, nowag, sparsegpt
from effllm.solvers.nm.armor import _left, _right, times_left, times_right
from effllm.solvers.nm.core import sweep
from effllm.solvers.nm.masks import normalize
from tests.solvers.nm.problems import layer, loss


def spd(k: int, seed: int = 0) -> Tensor:
    x = torch.randn(4 * k, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.t() @ x / (4 * k) + 0.01 * torch.eye(k, dtype=torch.float64)


def metric(e: Tensor, h: Tensor) -> float:
    return float(((e @ h) * e).sum())


@pytest.mark.parametrize("kind", ["full", "diagonal"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (6, 8), (8, 16), (1, 4)])
def test_loss_only_falls_and_pattern_holds(kind: str, n: int, m: int) -> None:
    w, moments, _ = layer(n=32, k=96)
    done = armor(w, moments, n, m, block=16, metric=kind, rounds=6, tolerance=0)
    assert len(done.history) > 3 and all(b < a for a, b in zip(done.history, done.history[1:], strict=False))
    assert (done.mask.view(32, -1, m).sum(-1) == n).all() and (done.core[~done.mask] == 0).all()
    assert done.left.shape == (2, 16, 16) and done.right.shape == (6, 16, 16)
    assert done.history[-1] < 0.8 * done.history[0]


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_without_rounds_it_is_the_start(kind: str) -> None:
    w, moments, x = layer()
    done = armor(w, moments, 2, 4, block=16, metric=kind, rounds=0)
    plain = w * nm_mask(nowag(w, moments), 2, 4)
    if kind == "diagonal":
        torch.testing.assert_close(done.dense(), plain, rtol=1e-5, atol=1e-6)
    else:
        eye = torch.eye(16)
        assert (done.left == eye).all() and (done.right == eye).all()
        assert torch.equal(done.dense(), sparsegpt(w, moments, 2, 4).weight)
        assert loss(w, done.dense(), x) < loss(w, plain, x)


def test_history_is_the_loss_of_what_is_returned() -> None:
    w, moments, _ = layer()
    done = armor(w, moments, 2, 4, block=16, metric="diagonal", rounds=4)
    bar, rows, columns = normalize(w)
    got = done.dense() / rows[:, None] / columns
    weight = moments.hessian.diagonal()
    share = float(((got - bar) ** 2 * weight).sum() / (bar**2 * weight).sum())
    assert share == pytest.approx(done.history[-1], rel=1e-3)


def test_never_above_nowag_in_output_error() -> None:
    for seed in range(4):
        w, moments, x = layer(seed=seed, k=128)
        start = loss(w, w * nm_mask(nowag(w, moments), 2, 4), x)
        full, diagonal = (loss(w, armor(w, moments, 2, 4, block=8, metric=kind).dense(), x) for kind in ("full", "diagonal"))
        assert full < diagonal < start
        assert full < 0.7 * loss(w, sparsegpt(w, moments, 2, 4).weight, x)


def test_wrapper_steps_are_least_squares() -> None:
    gen = torch.Generator().manual_seed(0)
    w, p = torch.randn(12, 24, generator=gen).double(), torch.randn(12, 24, generator=gen).double()
    h = spd(24)
    a, eh = _left(torch.zeros(3, 4, 4, dtype=torch.float64), p, h, w @ h)
    root = torch.linalg.cholesky(h)
    for i in range(3):
        part = slice(4 * i, 4 * i + 4)
        exact = torch.linalg.lstsq((p[part] @ root).t(), (w[part] @ root).t()).solution.t()
        torch.testing.assert_close(a[i], exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(eh, (w - times_left(a, p)) @ h)
    b = torch.zeros(4, 6, 6, dtype=torch.float64)
    e = w.clone()
    for _ in range(60):  # blocks in turn reach the joint optimum: no gradient is left in any block
        b, eh = _right(b, p, h, (w - times_right(p, b)) @ h)
        assert metric(w - times_right(p, b), h) <= metric(e, h) * (1 + 1e-12)
        e = w - times_right(p, b)
    torch.testing.assert_close(eh, e @ h)
    for j in range(4):
        part = slice(6 * j, 6 * j + 6)
        assert float((p[:, part].t() @ eh[:, part]).abs().max()) < 1e-3


@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 8), (8, 16)])
def test_group_step_is_the_best_of_all_places(n: int, m: int) -> None:
    # one group, one row: brute force over every set of places
    gen = torch.Generator().manual_seed(n)
    c, t = spd(m), torch.randn(m, generator=gen).double()
    s = torch.zeros(m, 1)
    keep = torch.zeros(m, 1, dtype=torch.bool)
    keep[:n] = True
    new, mask = sweep(s, keep, (c @ t)[:, None].float(), c.float(), torch.ones(1), n, m)
    best = min(
        metric((t - embed(places, torch.linalg.solve(c[list(places)][:, list(places)], (c @ t)[list(places)]), m))[None], c)
        for places in combinations(range(m), n)
    )
    got = metric((t - new[:, 0].double())[None], c)
    assert got <= best * (1.0001 if m < 16 else 1.1)  # 12870 places are searched, not tried
    assert int(mask.sum()) == n
    held, same = sweep(s, keep, (c @ t)[:, None].float(), c.float(), torch.ones(1), n, m, free=False)
    assert torch.equal(same, keep) and (held[n:] == 0).all()
    exact = torch.linalg.solve(c[:n, :n], (c @ t)[:n])
    torch.testing.assert_close(held[:n, 0].double(), exact, rtol=1e-4, atol=1e-5)


def embed(places: tuple[int, ...], values: Tensor, m: int) -> Tensor:
    out = torch.zeros(m, dtype=torch.float64)
    out[list(places)] = values
    return out


def test_ends_below_the_published_steps() -> None:
    """The paper's iteration (Adam on A, B and S, then an exact step on a sampled group per pair of blocks), 150 times, against 40 rounds, in less time."""
    torch.manual_seed(0)
    d, (w, moments, _) = 8, layer(n=32, k=32)
    bar, _, _ = normalize(w)
    weight = moments.hessian.diagonal() / moments.hessian.diagonal().mean()
    mask = nm_mask(nowag(w, moments), 2, 4)
    a, b = (torch.eye(d).repeat(4, 1, 1).requires_grad_() for _ in range(2))
    s = (bar * mask).requires_grad_()
    adam = torch.optim.Adam([a, b, s], lr=3e-3)  # thirty times the paper's rate: it takes as many steps
    zero = float((bar**2 * weight).sum())
    value = 1.0
    for _ in range(150):
        adam.zero_grad()
        error = times_right(times_left(a, s * mask), b) - bar
        lost = (error**2 * weight).sum()
        value = min(value, float(lost.detach()) / zero)
        lost.backward()
        adam.step()
        with torch.no_grad():
            s.mul_(mask)
            error = (bar - times_right(times_left(a, s), b)) * weight
            pull = times_right(times_left(a.transpose(1, 2).contiguous(), error), b.transpose(1, 2).contiguous())
            for i in range(4):
                for j in range(4):
                    size = pull[i * d : i * d + d, j * d : j * d + d].reshape(d, d // 4, 4).abs().sum(-1)
                    at = int(torch.multinomial(size.flatten(), 1))
                    row, g = at // (d // 4), 4 * (at % (d // 4))
                    rows, columns = slice(i * d, i * d + d), slice(j * d + g, j * d + g + 4)
                    c = (b[j, g : g + 4] * weight[j * d : j * d + d]) @ b[j, g : g + 4].t()
                    curve = (a[i, :, row] ** 2).sum()[None]
                    old, keep = s[i * d + row, columns, None], mask[i * d + row, columns, None]
                    new, kept = sweep(old, keep, pull[i * d + row, columns, None].clone(), c, curve, 2, 4)
                    s[rows][row, columns], mask[rows][row, columns] = new[:, 0], kept[:, 0]
    ours = armor(w, moments, 2, 4, block=d, metric="diagonal", rounds=40, tolerance=0)
    assert value < 0.8 * ours.history[0]  # the published steps do work
    assert ours.history[-1] < value


def test_dead_inputs_and_empty_rows_are_no_obstacle() -> None:
    w, _, x = layer()
    x[:, 16:32], w[:16] = 0, 0
    moments = Moments(x.t() @ x, x.sum(0), x.abs().sum(0), len(x))
    for kind in ("full", "diagonal"):
        done = armor(w, moments, 2, 4, block=16, metric=kind)
        assert torch.isfinite(done.dense()).all() and done.dense()[:16].abs().max() < 1e-4
        assert done.history[-1] < done.history[0]


def test_bad_input_is_named() -> None:
    w, moments, _ = layer()
    with pytest.raises(WeightError, match="E-WGT-BLOCK"):
        armor(w, moments, 2, 4, block=24)
    with pytest.raises(WeightError, match="E-WGT-NM"):
        armor(w, moments, 8, 16, block=8)
    with pytest.raises(RecipeError, match="E-RCP-METRIC"):
        armor(w, moments, 2, 4, block=16, metric="ful")
