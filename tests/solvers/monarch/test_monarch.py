"""Monarch solvers against their formulas: exact where the weight is Monarch, the sigma^2 identity, monotone descent, and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from effllm.errors import CalibrationError, WeightError
from effllm.runtime.formats import monarch
from effllm.solvers.moments import Moments, of_inputs
from effllm.solvers.monarch import Factors, Grid, Metric, descend, factorize, plain, rank_for, solve, whitened
from effllm.solvers.monarch.descend import refit, truncate

SHAPES = [(64, 48, 4, 4, 1), (64, 48, 4, 4, 3), (24, 60, 6, 6, 2), (30, 30, 4, 4, 2), (30, 17, 3, 5, 2), (36, 36, 6, 6, 1)]


def made(n: int, k: int, i: int, o: int, t: int, strided: bool, seed: int = 0) -> Tensor:
    """A random weight (N, K) fp64 that is Monarch."""
    g = torch.Generator().manual_seed(seed)
    s, p = monarch.sizes(n, k, i, o)
    left, right = torch.randn(o, i, s, t, generator=g, dtype=torch.float64), torch.randn(o, i, t, p, generator=g, dtype=torch.float64)
    return monarch.of_blocks(left @ right, n, k, strided)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def inputs(k: int, tokens: int = 400, seed: int = 1) -> Tensor:
    """Correlated inputs with a few large channels, as layers of language models have them."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=g, dtype=torch.float64) * torch.logspace(0, -2, k, dtype=torch.float64)
    x = torch.randn(tokens, k, generator=g, dtype=torch.float64) @ mix
    x[:, : max(1, k // 16)] *= 10
    return x


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_monarch_weight_is_its_own_projection(shape: tuple[int, ...], strided: bool) -> None:
    n, k, i, o, t = shape
    w = made(*shape, strided)
    grid = Grid(n, k, i, o, t, strided)
    metric = Metric.of(of_inputs(inputs(k)), k)
    assert relative(plain(w, grid).dense(), w) < 1e-12
    assert relative(whitened(w, grid, metric).dense(), w) < 1e-12
    found, costs = descend(w, whitened(w, grid, metric), metric, 3)
    assert relative(found.dense(), w) < 1e-10 and costs == sorted(costs, reverse=True)


@pytest.mark.parametrize("strided", [False, True])
def test_squared_error_is_the_sum_of_discarded_singular_values(strided: bool) -> None:
    w = torch.randn(30, 26, dtype=torch.float64)
    grid = Grid(30, 26, 4, 3, 2, strided)
    discarded = sum(float((torch.linalg.svdvals(b)[2:] ** 2).sum()) for b in grid.blocks(w).reshape(-1, 10, 7))
    assert float((plain(w, grid).dense() - w).square().sum()) == pytest.approx(discarded, rel=1e-12)


def test_projection_is_idempotent() -> None:
    grid = Grid(40, 32, 4, 4, 2)
    once = plain(torch.randn(40, 32, dtype=torch.float64), grid).dense()
    assert relative(plain(once, grid).dense(), once) < 1e-12


def test_the_permuted_fourier_matrix_is_monarch() -> None:
    """Columns of the DFT regrouped by residue: every block of the strided form has rank one; real and imaginary parts rank two."""
    m = 6
    n = m * m
    order = torch.arange(n).view(m, m).t().reshape(-1)
    dft = torch.fft.fft(torch.eye(n, dtype=torch.float64))[:, order]
    blocks = monarch.to_blocks(torch.view_as_real(dft)[..., 0], m, m, True) + 1j * monarch.to_blocks(torch.view_as_real(dft)[..., 1], m, m, True)
    sigma = torch.linalg.svdvals(blocks)
    assert float(sigma[..., 1:].max()) < 1e-12 * float(sigma.max())
    for part in (dft.real, dft.imag):
        assert relative(plain(part.contiguous(), Grid(n, n, m, m, 2, True)).dense(), part) < 1e-12
        assert relative(plain(part.contiguous(), Grid(n, n, m, m, 1, True)).dense(), part) > 0.1


def test_contiguous_is_strided_on_permuted_rows() -> None:
    w = torch.randn(24, 20, dtype=torch.float64)
    order = torch.arange(24).view(6, 4).t().reshape(-1)  # rows o, o + 4, ...: the classes of the strided form, one after another
    a = plain(w, Grid(24, 20, 5, 4, 2, True)).dense()
    b = plain(w[order], Grid(24, 20, 5, 4, 2, False)).dense()
    assert relative(a[order], b) < 1e-12


def test_padding_crops_exactly() -> None:
    """30 inputs in 4 blocks: the padded columns and rows stay zero, and full rank is the weight itself."""
    w = torch.randn(30, 30, dtype=torch.float64)
    metric = Metric.of(of_inputs(inputs(30)), 30)
    found = descend(w, whitened(w, Grid(30, 30, 4, 4, 3), metric), metric, 2)[0]
    assert float(found.right[:, 3, :, 6:].abs().max()) < 1e-12 and float(found.left[3, :, 6:].abs().max()) < 1e-12
    assert relative(plain(w, Grid(30, 30, 4, 4, 8)).dense(), w) < 1e-12


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("n", "k", "i", "o"), [(48, 64, 4, 4), (64, 36, 3, 4), (30, 50, 4, 7)])
def test_descent_beats_whitened_beats_plain(n: int, k: int, i: int, o: int, strided: bool) -> None:
    g = torch.Generator().manual_seed(2)
    w = torch.randn(n, k, generator=g, dtype=torch.float64)
    s, p = monarch.sizes(n, k, i, o)
    for t in (1, min(s, p) // 2):
        grid, metric = Grid(n, k, i, o, t, strided), Metric.of(of_inputs(inputs(k)), k)
        first, second = (metric.loss(w - f.dense()) for f in (plain(w, grid), whitened(w, grid, metric)))
        found, costs = descend(w, whitened(w, grid, metric), metric, 6)
        assert costs[0] == pytest.approx(second) and costs == sorted(costs, reverse=True)
        assert metric.loss(w - found.dense()) == pytest.approx(costs[-1], rel=1e-9)
        assert costs[-1] < second < first


@pytest.mark.parametrize("shape", [(1, 7, 12), (3, 12, 7), (2, 9, 9)])
def test_truncation_is_the_best_in_its_metric(shape: tuple[int, int, int]) -> None:
    aim = torch.randn(*shape, dtype=torch.float64)
    chol = torch.linalg.cholesky(torch.cov(torch.randn(shape[2], 50, dtype=torch.float64)))
    left, right = truncate(aim, chol, 3)
    error = ((aim - left @ right) @ chol).square().sum((1, 2))
    best = (torch.linalg.svdvals(aim @ chol)[:, 3:] ** 2).sum(1)
    assert torch.allclose(error, best, rtol=1e-9)


def test_cross_moments_aim_at_the_dense_output() -> None:
    """The cost with cross moments is that of |W d - M x|^2 over the tokens, up to a constant that no M changes."""
    d = inputs(32)
    x = d + 0.3 * inputs(32, seed=5)
    w = torch.randn(24, 32, dtype=torch.float64)
    metric = Metric.of(of_inputs(x, d), 32, 1e-9)
    aim = metric.aim(w)
    grid = Grid(24, 32, 4, 4, 2)

    def true(m: Tensor) -> float:
        return float((d @ w.t() - x @ m.t()).square().sum())

    m1, m2 = plain(w, grid).dense(), factorize(aim, grid, metric).dense()
    scale = float(of_inputs(x, d).hessian.diagonal().mean())
    assert (metric.loss(aim - m1) - metric.loss(aim - m2)) * scale == pytest.approx(true(m1) - true(m2), rel=1e-5)
    blind = factorize(w, grid, Metric(metric.h)).dense()
    assert true(m2) < true(blind)
    same = Metric.of(of_inputs(x, x), 32)
    assert relative(same.aim(w), w) < 1e-9


def test_refit_is_the_least_squares_solution() -> None:
    w, x = torch.randn(20, 24, dtype=torch.float64), inputs(24)
    metric = Metric.of(of_inputs(x), 24, 1e-9)
    start = plain(w, Grid(20, 24, 4, 2, 2))
    fitted = Factors(start.grid, refit(w, start.right, metric, start), start.right)
    assert metric.loss(w - fitted.dense()) < metric.loss(w - start.dense())
    for c in range(2):  # normal equations: what is left is orthogonal to the outputs of the first stage
        a = torch.block_diag(*start.right[c])
        rest = (w - fitted.dense())[c * 10 : (c + 1) * 10]
        assert float((rest @ metric.h @ a.t()).norm()) < 1e-6 * float((w[c * 10 : (c + 1) * 10] @ metric.h @ a.t()).norm())


def test_fewer_tokens_than_channels() -> None:
    few = of_inputs(inputs(40, tokens=10))
    with pytest.raises(CalibrationError, match="E-CAL-HESSIAN"):
        Metric.of(few, 40, 0.0)
    packed = solve(torch.randn(24, 40), few, rank=2)
    assert bool(torch.isfinite(monarch.unpack(packed)).all())


def test_ratio_is_the_share_of_values_kept() -> None:
    assert rank_for(0.5, 4096, 4096, 4, 4) == 256
    assert rank_for(0.5, 4096, 4096, 4, 4, multiple=100) == 200
    for n, k, i, o in ((4096, 11008, 4, 4), (576, 576, 4, 3), (100, 37, 4, 4)):
        t = rank_for(0.5, n, k, i, o)
        assert Grid(n, k, i, o, t).values <= 0.5 * n * k < Grid(n, k, i, o, t + 1).values
    assert rank_for(5.0, 64, 64, 4, 4) == 16
    packed = solve(torch.randn(64, 64), ratio=0.5, dtype=torch.float32)
    assert packed.nbytes == 4 * 0.5 * 64 * 64


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.02), (4, 0.25)])
@pytest.mark.parametrize("calibrated", [False, True])
def test_quantized_factors_stay_close(bits: int, limit: float, calibrated: bool) -> None:
    w = made(64, 96, 4, 4, 8, False)
    moments = of_inputs(inputs(96)) if calibrated else None
    packed = solve(w, moments, rank=8, bits=bits, group=16)
    metric = Metric.of(of_inputs(inputs(96)), 96)
    error = w - monarch.unpack(packed, torch.float64)
    found = metric.loss(error) / metric.loss(w) if calibrated else float(error.norm() / w.norm()) ** 2
    assert math.sqrt(found) < limit
    assert packed.attrs["w1"]["attrs"]["bits"] == bits == packed.attrs["w2"]["attrs"]["bits"]


def test_second_factor_makes_up_for_the_first() -> None:
    """Quantizing in the metric, with the second factor fitted to the quantized first, beats rounding both."""
    w, x = torch.randn(64, 64, dtype=torch.float64), inputs(64)
    moments = of_inputs(x)
    metric = Metric.of(moments, 64)
    near = solve(w, moments, rank=8, bits=3, group=16)
    from effllm.solvers.monarch.quantize import quantize

    rounded = quantize(w, factorize(w, Grid(64, 64, 4, 4, 8), metric), None, bits=3, group=16)
    far = monarch.make(*rounded, shape=(64, 64), blocks_in=4, blocks_out=4)
    a, b = (metric.loss(w - monarch.unpack(p, torch.float64)) for p in (near, far))
    assert a < 0.8 * b


def test_zero_weight_and_determinism() -> None:
    assert float(monarch.unpack(solve(torch.zeros(16, 16), rank=2)).abs().max()) == 0.0
    w, m = torch.randn(32, 32), of_inputs(inputs(32))
    a, b = solve(w, m, rank=2), solve(w, m, rank=2)
    assert all(torch.equal(a.tensors[key], b.tensors[key]) for key in a.tensors)


def test_factors_of_large_and_small_weights_fit_their_type() -> None:
    for scale in (1e-6, 1e4):
        w = made(32, 32, 4, 4, 2, False) * scale
        packed = solve(w, rank=2, dtype=torch.float16)
        assert relative(monarch.unpack(packed, torch.float64), w) < 2e-3


def _moments(**change: Tensor) -> Moments:
    x = inputs(16)
    m = of_inputs(x)
    return Moments(**{**vars(m), **change})


BAD = [
    ({"rank": 0}, "E-WGT-RANK"), ({"rank": 9}, "E-WGT-RANK"), ({"rank": -1}, "E-WGT-RANK"),
    ({"rank": 1, "ratio": 0.5}, "E-WGT-RANK"), ({"ratio": 1e-4}, "E-WGT-RANK"),
    ({"rank": 1, "blocks": 0}, "E-WGT-BLOCKS"), ({"rank": 1, "blocks": (17, 2)}, "E-WGT-BLOCKS"), ({"rank": 1, "blocks": 3, "pad": False}, "E-WGT-PAD"),
    ({"rank": 1, "method": "wihtened"}, "E-WGT-SOLVER"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "code"), BAD, ids=[str(b[0]) for b in BAD])
def test_bad_options(options: dict[str, object], code: str) -> None:
    with pytest.raises(WeightError, match=code):
        solve(torch.randn(16, 16), **{"blocks": 2, **options})  # type: ignore[arg-type]


WEIGHTS = [torch.randn(16), torch.full((16, 16), math.nan), torch.ones(16, 16, dtype=torch.int8), torch.empty(16, 16, device="meta")]


@pytest.mark.parametrize("w", WEIGHTS, ids=["vector", "nan", "int8", "meta"])
def test_bad_weights(w: Tensor) -> None:
    with pytest.raises(WeightError):
        solve(w, rank=1)


@pytest.mark.parametrize("key", ["hessian", "total", "cross"])
def test_bad_statistics(key: str) -> None:
    with pytest.raises(CalibrationError, match="E-CAL-HESSIAN"):
        solve(torch.randn(16, 16), _moments(**{key: torch.randn(3, 3)}), rank=1)
    broken = torch.full((16,) if key == "total" else (16, 16), math.nan)
    with pytest.raises(CalibrationError, match="E-CAL-HESSIAN"):
        solve(torch.randn(16, 16), _moments(**{key: broken}), rank=1)


def test_calibrated_methods_need_calibration() -> None:
    with pytest.raises(CalibrationError, match="E-CAL-NONE"):
        solve(torch.randn(16, 16), rank=1, method="descent")
