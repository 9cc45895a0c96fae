"""Bases weighted by what attention makes of keys and values: never worse than principal axes by their own measure."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effllm.errors import CacheError
from effllm.solvers.kv.basis import pca
from effllm.solvers.kv.weighted import lost, weighted_basis

D, RANKS = 12, [3, 6, 9]


def moment(seed: int, heads: int = 3) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(heads, 200, D, generator=g, dtype=torch.float64) * torch.logspace(0, -1, D, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(heads, D, D, generator=g, dtype=torch.float64))[0]
    return (turn @ (x.mT @ x) @ turn.mT) / 200


def test_lost_is_the_mean_squared_error_of_scores() -> None:
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(50, D, generator=g, dtype=torch.float64) @ torch.randn(D, D, generator=g, dtype=torch.float64) for _ in range(2))
    u = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64))[0]
    got = lost(u, k.mT @ k / 50, q.mT @ q / 50, RANKS)
    for r, share in zip(RANKS, got.tolist(), strict=True):
        gone = k - k @ u[:, :r] @ u[:, :r].mT
        assert share == pytest.approx(float((q @ gone.mT).square().mean() / (q @ k.mT).square().mean()), rel=1e-9)


def test_better_than_principal_axes_and_orthonormal() -> None:
    c, w = moment(1), moment(2)
    u = weighted_basis(c, w, RANKS)
    torch.testing.assert_close(u.mT @ u, torch.eye(D, dtype=torch.float64).expand(3, D, D), rtol=0, atol=1e-10)
    made, axes = (lost(x, c, w, RANKS).log().mean(-1) for x in (u, pca(c)))
    assert (made < axes - 0.1).all()


def test_without_weights_principal_axes_stay_the_best() -> None:
    c = moment(3)
    eye = torch.eye(D, dtype=torch.float64).expand_as(c)
    torch.testing.assert_close(lost(weighted_basis(c, eye, RANKS, steps=20), c, eye, RANKS), lost(pca(c), c, eye, RANKS), rtol=1e-9, atol=1e-12)


def test_heads_do_not_mix() -> None:
    c, w = moment(4), moment(5)
    together = weighted_basis(c, w, RANKS, steps=30)
    torch.testing.assert_close(together[1], weighted_basis(c[1:2], w[1:2], RANKS, steps=30)[0], rtol=0, atol=1e-8)


def test_refusals() -> None:
    c = moment(6)
    for ranks in ([], [0], [D]):
        with pytest.raises(CacheError, match="E-KVC-RANK"):
            weighted_basis(c, c, ranks)
    with pytest.raises(CacheError, match="E-KVC-CALIBRATION"):
        weighted_basis(c * torch.nan, c, RANKS)
