"""Layer-wise ratios: the spectrum's exponent does not depend on the aspect, means are met, and limits hold."""

from __future__ import annotations

import pytest
import torch

from effllm.errors import RecipeError
from effllm.solvers.nm.ratios import HIGHEST, essential, farms, farms_alpha, knee, power_law, uniform


def test_exponent_of_gaussian_matrices_does_not_depend_on_their_shape() -> None:
    gen = torch.Generator().manual_seed(0)
    shapes = ((256, 256), (128, 768), (768, 128))
    weights = [torch.randn(s, generator=gen) / 10 for s in shapes]
    windows = [farms_alpha(w, side=128, steps=3) for w in weights]
    whole = [power_law(torch.linalg.svdvals(w).double() ** 2) for w in weights]
    assert windows == pytest.approx([2.14, 2.14, 2.12], abs=0.06)
    assert whole == pytest.approx([2.12, 4.11, 4.14], abs=0.25)
    assert farms_alpha(weights[0] * 7, side=128, steps=3) == pytest.approx(windows[0], rel=1e-4)


def test_exponent_of_a_power_law_is_found() -> None:
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert power_law(u ** (-1 / 1.5)) == pytest.approx(2.5, abs=0.03)
    assert power_law(torch.ones(10)) == float("inf")


def test_farms_prunes_light_tails_more_and_meets_the_total() -> None:
    alphas, sizes = {"a": 2.0, "b": 3.0, "c": 5.0}, {"a": 100, "b": 300, "c": 50}
    found = farms(alphas, sizes, 0.5)
    assert found["a"] < found["b"] < found["c"]
    assert sum(found[n] * sizes[n] for n in sizes) / 450 == pytest.approx(0.5)
    assert found["c"] / found["a"] == pytest.approx(1.2 / 0.8)
    assert farms(alphas, sizes, 0.5, spread=0) == pytest.approx(uniform(sizes, 0.5))
    assert farms(dict.fromkeys(sizes, 2.0), sizes, 0.5) == pytest.approx(uniform(sizes, 0.5))


def test_farms_does_not_empty_a_layer() -> None:
    sizes = {"a": 100, "b": 100, "c": 100}
    found = farms({"a": 2.0, "b": 3.0, "c": 9.0}, sizes, 0.9, spread=0.3)
    assert max(found.values()) == HIGHEST
    assert sum(found.values()) / 3 == pytest.approx(0.9)
    with pytest.raises(RecipeError, match="E-RCP-RATIO"):
        farms({"a": 2.0}, {"a": 10}, 0.999)


def test_knee_is_where_the_fall_begins() -> None:
    sparsity = [0.1 * i for i in range(9)]
    quality = [90, 89.9, 89.7, 89.6, 89.3, 84.0, 70.0, 40.0, 10.0]
    assert knee(sparsity, quality) == pytest.approx(0.4)
    assert knee(sparsity, [90 - i for i in range(9)]) == sparsity[-1]  # an even slope has no knee
    assert knee(sparsity, [50.0] * 9) == sparsity[-1]
    with pytest.raises(RecipeError, match="E-RCP-RATIO"):
        knee([0.1, 0.1, 0.2], [1, 2, 3])


def test_global_magnitude() -> None:
    gen = torch.Generator().manual_seed(2)
    weights = {"small": torch.randn(10, 20, generator=gen) * 0.1, "large": torch.randn(10, 30, generator=gen)}
    found = essential(weights, 0.4)
    assert (found["small"] * 200 + found["large"] * 300) / 500 == pytest.approx(0.4, abs=1 / 500)
    assert found["small"] > found["large"]
    assert essential(weights, 0.0) == {"small": 0.0, "large": 0.0}
    with pytest.raises(RecipeError, match="small"):
        essential({"small": weights["small"] * 1e-6, "large": weights["large"]}, 0.5)
    with pytest.raises(RecipeError, match="E-RCP-RATIO"):
        uniform({"a": 1}, 1.0)
