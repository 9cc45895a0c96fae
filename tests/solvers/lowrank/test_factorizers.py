"""Each factorizer against its own formula: predicted losses, identities between methods, neutral settings, bad input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from effllm.errors import CalibrationError, EffllmError, RecipeError, WeightError
from effllm.solvers.lowrank import factorize
from effllm.solvers.lowrank.afm import afm
from effllm.solvers.lowrank.asvd import asvd
from effllm.solvers.lowrank.factors import Factors
from effllm.solvers.lowrank.fwsvd import FLOOR, fwsvd
from effllm.solvers.lowrank.metric import loss
from effllm.solvers.lowrank.svd import svd
from effllm.solvers.lowrank.whitened import spectrum, update_a, whitened
from effllm.solvers.moments import Moments, of_inputs

SHAPES = [(24, 24), (40, 17), (17, 40)]


def problem(n: int, k: int, tokens: int = 400, seed: int = 0) -> tuple[Tensor, Tensor, Moments]:
    """w (n, k), correlated inputs (tokens, k) with a mean, their moments; all fp64."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=gen, dtype=torch.float64) @ (torch.randn(k, k, generator=gen).double() * torch.logspace(0, -2, k)[:, None])
    x = x + 2 * torch.randn(k, generator=gen).double()
    return torch.randn(n, k, generator=gen).double(), x, of_inputs(x)


def direct(w: Tensor, f: Factors, x: Tensor) -> float:
    """||W x - W' x - shift||^2 over all inputs."""
    out = x @ (w - f.dense()).t()
    return float(((out if f.shift is None else out - f.shift) ** 2).sum())


def fisher(w: Tensor) -> Tensor:
    return torch.rand(w.shape, generator=torch.Generator().manual_seed(5)).double() * torch.logspace(0, 2, w.shape[0])[:, None]


def every(w: Tensor, rank: int, m: Moments) -> dict[str, Factors]:
    m = replace(m, fisher=fisher(w))
    return {"svd": svd(w, rank), "fwsvd": fwsvd(w, rank, m), "asvd": asvd(w, rank, m), "whitened": whitened(w, rank, m, damp=0), "afm": afm(w, rank, m, damp=0)}


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_full_rank_is_the_weight(n: int, k: int) -> None:
    w, _, m = problem(n, k)
    for name, f in every(w, min(n, k), m).items():
        assert f.rank == min(n, k)
        torch.testing.assert_close(f.dense(), w, rtol=0, atol=1e-8, msg=name)
        if f.shift is not None:
            assert float(f.shift.abs().max()) < 1e-7


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("rank", [1, 6, 16])
def test_losses_are_the_dropped_squares(n: int, k: int, rank: int) -> None:
    w, x, m = problem(n, k)
    tail = float((torch.linalg.svdvals(w)[rank:] ** 2).sum())
    assert float(((w - svd(w, rank).dense()) ** 2).sum()) == pytest.approx(tail, rel=1e-8)
    sigma = spectrum(w, m, damp=0)
    assert direct(w, whitened(w, rank, m, damp=0), x) == pytest.approx(float((sigma[rank:] ** 2).sum()), rel=1e-6)
    rows = fisher(w).sum(1)
    rows = rows / rows.mean() + FLOOR
    weighted = float((torch.linalg.svdvals(rows.sqrt()[:, None] * w)[rank:] ** 2).sum())
    f = fwsvd(w, rank, replace(m, fisher=fisher(w)))
    assert float((rows[:, None] * (w - f.dense()) ** 2).sum()) == pytest.approx(weighted, rel=1e-8)
    covariance = w @ torch.cov(x.t(), correction=0) @ w.t()
    eigen = torch.linalg.eigvalsh(covariance).flip(0)
    assert direct(w, afm(w, rank, m, damp=0), x) / x.shape[0] == pytest.approx(float(eigen[rank:].sum()), rel=1e-6)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_order_of_the_methods(n: int, k: int) -> None:
    """Whitened is the optimum without a bias, the one with a bias is better still, and the loss falls with the rank."""
    w, x, m = problem(n, k)
    last = dict.fromkeys(every(w, 1, m), float("inf"))
    for rank in (2, 5, 9, 13):
        now = {name: direct(w, f, x) for name, f in every(w, rank, m).items()}
        assert now["afm"] < now["whitened"] < min(now["svd"], now["fwsvd"], now["asvd"])
        assert now["whitened"] < last["whitened"] and now["afm"] < last["afm"]
        last = now


def test_afm_keeps_the_mean_output() -> None:
    w, x, m = problem(20, 30)
    f = afm(w, 4, m)
    assert f.shift is not None
    torch.testing.assert_close(f.dense() @ x.mean(0) + f.shift, w @ x.mean(0), rtol=1e-9, atol=1e-9)


def test_identities_between_methods() -> None:
    w, _, m = problem(20, 30)
    ones = replace(m, fisher=torch.ones(20, 30))
    torch.testing.assert_close(fwsvd(w, 5, ones).dense(), svd(w, 5).dense())
    flat = replace(m, hessian=torch.eye(30).double(), magnitude=torch.ones(30).double())
    torch.testing.assert_close(whitened(w, 5, flat, damp=0).dense(), svd(w, 5).dense())
    torch.testing.assert_close(asvd(w, 5, flat).dense(), svd(w, 5).dense())
    scale = torch.logspace(0, -1, 30).double()
    diagonal = replace(m, hessian=torch.diag(scale**2), magnitude=scale * m.count)
    torch.testing.assert_close(asvd(w, 5, diagonal, alpha=1).dense(), whitened(w, 5, diagonal, damp=0).dense(), rtol=1e-4, atol=1e-4)
    outputs = torch.eye(20).double() * 3
    torch.testing.assert_close(whitened(w, 5, replace(m, outputs=outputs)).dense(), whitened(w, 5, m).dense(), rtol=1e-6, atol=1e-6)


def test_output_metric_is_what_is_minimized() -> None:
    w, _, m = problem(20, 30)
    g = torch.randn(60, 20, generator=torch.Generator().manual_seed(1)).double()
    outputs = g.t() @ g
    both = replace(m, outputs=outputs)
    f, plain = whitened(w, 6, both, damp=0, output_damp=0), whitened(w, 6, m, damp=0)

    def weighted(z: Tensor) -> float:
        e = w - z
        return float(torch.trace(outputs @ e @ m.hessian @ e.t()))

    sigma = spectrum(w, both, damp=0, output_damp=0)
    assert weighted(f.dense()) == pytest.approx(float((sigma[6:] ** 2).sum()), rel=1e-6)
    assert weighted(f.dense()) < weighted(plain.dense())


def drifted() -> tuple[Tensor, Tensor, Tensor, Moments]:
    """Dense inputs d and what a compressed prefix makes of them."""
    w, d, _ = problem(20, 30)
    gen = torch.Generator().manual_seed(9)
    x = d @ (torch.eye(30).double() + 0.1 * torch.randn(30, 30, generator=gen).double()) + 0.3 * torch.randn(d.shape, generator=gen).double()
    return w, d, x, of_inputs(x, d)


@pytest.mark.parametrize("rank", [2, 8, 20])
def test_dense_targets_are_the_optimum(rank: int) -> None:
    """No other rank-r matrix, tried along random directions and against the plain solution, brings W' x nearer to W d."""
    w, d, x, m = drifted()

    def off(z: Tensor) -> float:
        return float((d @ w.t() - x @ z.t()).square().sum())

    f = whitened(w, rank, m, damp=0)
    best = off(f.dense())
    assert best < off(whitened(w, rank, replace(m, cross=None), damp=0).dense())
    assert off(f.dense()) - off(torch.zeros_like(w)) == pytest.approx(float(loss(w, f.dense(), m)), rel=1e-8)
    gen = torch.Generator().manual_seed(2)
    for _ in range(20):
        da, db = torch.randn(f.a.shape, generator=gen).double(), torch.randn(f.b.shape, generator=gen).double()
        for eps in (1e-4, -1e-4):
            assert off((f.a + eps * da) @ (f.b + eps * db)) >= best * (1 - 1e-12)


def test_dense_targets_with_equal_inputs_change_nothing() -> None:
    w, x, m = problem(20, 30)
    same = of_inputs(x, x)
    torch.testing.assert_close(whitened(w, 7, same).dense(), whitened(w, 7, m).dense(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(afm(w, 7, same).dense(), afm(w, 7, m).dense(), rtol=1e-6, atol=1e-6)


def test_afm_with_dense_targets_keeps_the_dense_mean() -> None:
    w, d, x, m = drifted()
    f, plain = afm(w, 5, m, damp=0), whitened(w, 5, m, damp=0)
    assert f.shift is not None
    torch.testing.assert_close(f.dense() @ x.mean(0) + f.shift, w @ d.mean(0))
    off = float((d @ w.t() - x @ f.dense().t() - f.shift).square().sum())
    assert off < float((d @ w.t() - x @ plain.dense().t()).square().sum())


def test_closed_form_update_fits_new_statistics() -> None:
    w, d, x, m = drifted()
    stale = whitened(w, 6, of_inputs(d), damp=0)
    fresh = update_a(w, stale, m, damp=0)
    assert torch.equal(fresh.b, stale.b)
    off = {name: float((d @ w.t() - x @ f.dense().t()).square().sum()) for name, f in (("stale", stale), ("fresh", fresh), ("best", whitened(w, 6, m, damp=0)))}
    assert off["best"] <= off["fresh"] < off["stale"]
    wanted = torch.linalg.lstsq(x @ fresh.b.t(), d @ w.t()).solution.t()
    torch.testing.assert_close(fresh.a, wanted, rtol=1e-5, atol=1e-6)


def test_statistics_in_chunks_are_the_same() -> None:
    w, x, m = problem(20, 30)
    halves = [of_inputs(part) for part in x.split(150)]
    summed = Moments(*(sum(getattr(h, key) for h in halves) for key in ("hessian", "total", "magnitude", "count")))
    torch.testing.assert_close(afm(w, 7, summed).dense(), afm(w, 7, m).dense())


def code(error: type[EffllmError], call: object) -> str:
    with pytest.raises(error) as caught:
        call()  # type: ignore[operator]
    return caught.value.code


@pytest.mark.parametrize("rank", [0, -1, 21])
def test_ranks_that_do_not_exist(rank: int) -> None:
    w, _, m = problem(20, 30)
    m = replace(m, fisher=fisher(w))
    for call in (lambda: svd(w, rank), lambda: fwsvd(w, rank, m), lambda: asvd(w, rank, m), lambda: whitened(w, rank, m), lambda: afm(w, rank, m)):
        assert code(WeightError, call) == "E-WGT-RANK"


def test_fewer_tokens_than_channels() -> None:
    """Singular statistics are an error undamped, and damped they keep what they know nothing about."""
    w, _, m = problem(20, 30, tokens=12)
    assert code(CalibrationError, lambda: whitened(w, 5, m, damp=0)) == "E-CAL-SINGULAR"
    f = whitened(w, 12, m)
    assert torch.isfinite(f.a).all() and torch.isfinite(f.b).all()
    assert float(loss(w, f.dense(), m)) < 1e-2 * float(loss(w, torch.zeros_like(w), m))
    assert torch.isfinite(whitened(w, 20, m).dense() - w).all() and float((whitened(w, 20, m).dense() - w).abs().max()) < 1e-6


def test_statistics_of_another_layer_and_broken_ones() -> None:
    w, _, m = problem(20, 30)
    _, _, other = problem(20, 31)
    for call in (lambda: whitened(w, 5, other), lambda: asvd(w, 5, other), lambda: afm(w, 5, other)):
        assert code(CalibrationError, call) == "E-CAL-HESSIAN"
    nan = replace(m, hessian=m.hessian * float("nan"))
    zero = replace(m, hessian=m.hessian * 0, magnitude=m.magnitude * 0)
    for broken in (nan, zero):
        assert code(CalibrationError, lambda broken=broken: whitened(w, 5, broken)) == "E-CAL-HESSIAN"
    assert code(CalibrationError, lambda: asvd(w, 5, zero)) == "E-CAL-HESSIAN"
    assert code(CalibrationError, lambda: whitened(w, 5, replace(m, cross=m.hessian * float("inf")))) == "E-CAL-HESSIAN"
    assert code(CalibrationError, lambda: whitened(w, 5, replace(m, outputs=torch.eye(7)))) == "E-CAL-HESSIAN"
    assert code(CalibrationError, lambda: afm(w, 5, replace(m, count=1))) == "E-CAL-SHORT"


def test_bad_fisher_weights() -> None:
    w, _, m = problem(20, 30)
    good = fisher(w)
    nan = good.clone()
    nan[3, 4] = float("nan")
    for bad in (None, nan, torch.zeros_like(good), good.t()):
        assert code(CalibrationError, lambda bad=bad: fwsvd(w, 5, replace(m, fisher=bad))) == "E-CAL-FISHER"
    good[7] = 0  # a row that no gradient reached
    assert torch.isfinite(fwsvd(w, 5, replace(m, fisher=good)).dense()).all()


def test_bad_weights() -> None:
    w, _, _ = problem(20, 30)
    w[2, 3] = float("inf")
    assert code(WeightError, lambda: svd(w, 5)) == "E-WGT-NAN"
    assert code(WeightError, lambda: svd(torch.zeros(3), 1)) == "E-WGT-DIM"


def test_by_name() -> None:
    w, _, m = problem(20, 30)
    m = replace(m, fisher=fisher(w))
    for name, f in every(w, 5, m).items():
        assert factorize(w, name, 5, m).a.shape == f.a.shape
        torch.testing.assert_close(factorize(w, name, 5, m, pivots=True).dense(), factorize(w, name, 5, m).dense())
    assert factorize(w, "afm", 5, m, pivots=True).shift is not None
    assert code(CalibrationError, lambda: factorize(w, "whitened", 5)) == "E-CAL-NONE"
    assert code(RecipeError, lambda: factorize(w, "whitend", 5, m)) == "E-RCP-METHOD"
