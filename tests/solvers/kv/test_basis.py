"""Projection onto leading columns: covariance, PCA, identities, folding into weights, greedy ranks."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from effllm.errors import CacheError
from effllm.solvers.kv import basis

G, D, T = 2, 16, 200


def data(seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(G, D, D, generator=g, dtype=torch.float64) * torch.logspace(0, -3, D, dtype=torch.float64)
    return torch.randn(3, G, T, D, generator=g, dtype=torch.float64) @ mix.mT + torch.randn(G, 1, D, generator=g, dtype=torch.float64)


def fitted(x: Tensor) -> tuple[Tensor, Tensor]:
    c = basis.Covariance()
    for part in x.split(1):  # in pieces
        c.add(part)
    flat = x.movedim(1, 0).flatten(1, 2)
    torch.testing.assert_close(c.mean, flat.mean(1))
    torch.testing.assert_close(c.centred, torch.stack([torch.cov(f.T, correction=0) for f in flat]))
    return basis.pca(c.centred), c.mean


def test_pca_is_orthogonal_and_monotone() -> None:
    x = data()
    u, mean = fitted(x)
    torch.testing.assert_close(u.mT @ u, torch.eye(D, dtype=torch.float64).expand(G, D, D), rtol=0, atol=1e-12)
    errors = [float((basis.restore(basis.project(x, u, mean, r), u, mean) - x).norm()) for r in range(D + 1)]
    assert all(a > b for a, b in itertools.pairwise(errors)) and errors[-1] < 1e-10
    # the best any projection of that rank can do
    flat = (x - mean[:, None]).movedim(1, 0).flatten(1, 2)
    bound = torch.linalg.svdvals(flat)[:, 5:].square().sum().sqrt()
    assert abs(errors[5] - float(bound)) < 1e-9


def test_truncate_is_project_and_restore_per_head() -> None:
    x = data()
    u, mean = fitted(x)
    ranks = torch.tensor([3, 11])
    made = basis.truncate(x, u, mean, ranks)
    for head, r in enumerate(ranks.tolist()):
        one = (x[:, head : head + 1], u[head : head + 1], mean[head : head + 1])
        torch.testing.assert_close(made[:, head : head + 1], basis.restore(basis.project(*one, r), *one[1:]))


def test_key_mean_cancels_and_value_mean_does_not() -> None:
    x, q = data(), torch.randn(3, G, 4, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    u, mean = fitted(x)
    z = basis.project(x, u, mean, 6)
    full = torch.softmax(q @ basis.restore(z, u, mean).mT * D**-0.5, -1)
    dropped = torch.softmax((q @ u[..., :6]) @ z.mT * D**-0.5, -1)
    torch.testing.assert_close(dropped, full)
    wrong = torch.softmax((q @ u[..., :6]) @ z.mT * 6**-0.5, -1)  # the scale is that of the whole head
    assert float((wrong - full).abs().max()) > 1e-3
    out = full @ basis.restore(z, u, mean)
    torch.testing.assert_close((full @ z) @ u[..., :6].mT + mean[:, None], out)
    assert float(((full @ z) @ u[..., :6].mT - out).abs().max()) > 1e-2


@pytest.mark.parametrize("with_bias", [True, False])
def test_folding_equals_projecting(with_bias: bool) -> None:
    g = torch.Generator().manual_seed(4)
    heads, k, n, ranks = 2 * G, 24, 20, [5, 9]
    u, mean = fitted(data())
    wv, wo = torch.randn(G * D, k, generator=g, dtype=torch.float64), torch.randn(n, heads * D, generator=g, dtype=torch.float64)
    bv = torch.randn(G * D, generator=g, dtype=torch.float64) if with_bias else None
    bo = torch.randn(n, generator=g, dtype=torch.float64) if with_bias else None
    x = torch.randn(7, k, generator=g, dtype=torch.float64)
    p = torch.softmax(torch.randn(heads, 1, 7, generator=g, dtype=torch.float64), -1)
    v = torch.nn.functional.linear(x, wv, bv).unflatten(-1, (G, D)).transpose(0, 1)
    v = basis.truncate(v[None], u, mean, torch.tensor(ranks))[0].repeat_interleave(2, 0)
    expected = torch.nn.functional.linear((p @ v).flatten(), wo, bo)
    fv, fbv = basis.fold_value(wv, bv, u, mean, ranks)
    fo, fbo = basis.fold_output(wo, bo, u, mean, ranks)
    assert fv.shape == (14, k) and fo.shape == (n, 28)
    z = torch.nn.functional.linear(x, fv, fbv).split(ranks, -1)
    folded = torch.cat([(p[h] @ z[h // 2]).flatten() for h in range(heads)])
    torch.testing.assert_close(torch.nn.functional.linear(folded, fo, fbo), expected)


def test_greedy_ranks_follow_the_change() -> None:
    weight = torch.tensor([[1.0, 4.0], [2.0, 8.0]])
    seen: list[Tensor] = []

    def change(ranks: Tensor) -> Tensor:
        seen.append(ranks.clone())
        return weight / ranks  # dropping from a low rank hurts more

    ranks = basis.greedy_ranks((2, 2), 64, 0.5, change, interval=8)
    assert ranks.sum() == 128 and ranks[0, 0] < ranks[1, 0] < ranks[0, 1] < ranks[1, 1] and (ranks % 8 == 0).all()
    assert (seen[0] == 64).all()
    floor = basis.greedy_ranks((2, 2), 64, 0.25, change, interval=8, floor=16)
    assert (floor == 16).all()
    assert (basis.greedy_ranks((3,), 64, 1.0, lambda r: r.float(), interval=8) == 64).all()


def test_bad_input() -> None:
    for call in (
        lambda: basis.greedy_ranks((2,), 64, 0.1, lambda r: r.float(), interval=16),
        lambda: basis.greedy_ranks((2,), 64, 0.5, lambda r: r.float(), interval=24),
        lambda: basis.greedy_ranks((2,), 64, 0.5, lambda r: r.float()[:1], interval=16),
    ):
        with pytest.raises(CacheError, match="E-KVC-RANK"):
            call()
    broken = basis.Covariance()
    broken.add(torch.full((1, 2, 3, 4), torch.nan))
    for c in (broken, basis.Covariance()):
        with pytest.raises(CacheError, match="E-KVC-CALIBRATION"):
            _ = c.centred
