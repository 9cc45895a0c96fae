"""SparseGPT: the update is the exact one, identity statistics change nothing, and pruning and quantizing meet in one format."""

from __future__ import annotations

import pytest
import torch

from effllm.errors import RecipeError, WeightError
from effllm.recipe import Bipolar
from effllm.runtime.formats import bipolar
from effllm.solvers.moments import Moments
from effllm.solvers.nm import magnitude, nm_mask, ratio_mask, sparsegpt, sparsegpt_quantized, sparsegpt_ratio, wanda
from effllm.solvers.search import search
from tests.solvers.nm.problems import layer, loss


def identity(k: int) -> Moments:
    return Moments(torch.eye(k), torch.zeros(k), torch.zeros(k), k)


@pytest.mark.parametrize("sort", [False, True])
def test_identity_statistics_give_magnitude(sort: bool) -> None:
    w, _, _ = layer(k=192)
    done = sparsegpt(w, identity(192), 2, 4, sort=sort)
    assert torch.equal(done.mask, nm_mask(magnitude(w), 2, 4))
    assert torch.equal(done.weight, w * done.mask)
    free = sparsegpt_ratio(w[:, :128], identity(128), 0.5)
    assert torch.equal(free.mask, ratio_mask(magnitude(w[:, :128]), 0.5, per="layer"))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (6, 8), (8, 16)])
@pytest.mark.parametrize("sort", [False, True])
def test_pattern_holds_and_loss_is_below_wanda(n: int, m: int, sort: bool) -> None:
    w, moments, x = layer(k=144)  # more than one block, the last one partial
    done = sparsegpt(w, moments, n, m, sort=sort)
    assert (done.mask.view(len(w), -1, m).sum(-1) == n).all()
    assert (done.weight[~done.mask] == 0).all()
    assert loss(w, done.weight, x) < loss(w, w * nm_mask(wanda(w, moments), n, m), x)


def test_between_least_squares_and_no_update() -> None:
    w, moments, x = layer()
    done = sparsegpt(w, moments, 2, 4, damp=1e-6)
    best = torch.zeros_like(w)
    for i, keep in enumerate(done.mask):
        best[i, keep] = torch.linalg.lstsq(x[:, keep].double(), (x @ w[i]).double()).solution.float()
    assert loss(w, best, x) <= loss(w, done.weight, x) <= loss(w, w * done.mask, x)


def test_one_pruned_column_is_made_up_for_exactly() -> None:
    w, moments, x = layer()
    keep = torch.ones_like(w, dtype=torch.bool)
    keep[:, 0] = False  # all other columns come later
    done = sparsegpt(w, moments, 4, 4, damp=1e-9, mask=keep)
    exact = torch.linalg.lstsq(x[:, 1:].double(), (x @ w.t()).double()).solution.t()
    torch.testing.assert_close(done.weight[:, 1:].double(), exact, rtol=1e-3, atol=1e-3)


def test_dead_inputs_go_first() -> None:
    w, _, x = layer()
    x[:, 4:6] = 0
    done = sparsegpt(w, Moments(x.t() @ x, x.sum(0), x.abs().sum(0), len(x)), 2, 4)
    assert not done.mask[:, 4:6].any() and done.mask[:, 6:8].all()
    x[:, 4:8] = 0  # a group without any input
    done = sparsegpt(w, Moments(x.t() @ x, x.sum(0), x.abs().sum(0), len(x)), 2, 4)
    assert (done.mask.view(len(w), -1, 4).sum(-1) == 2).all() and (done.weight[:, 4:8] == 0).all()
    nothing = Moments(torch.zeros(64, 64), torch.zeros(64), torch.zeros(64), 1)
    assert torch.isfinite(sparsegpt(w, nothing, 2, 4).weight).all()


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.7])
def test_without_a_pattern(ratio: float) -> None:
    w, moments, x = layer(k=160)
    done = sparsegpt_ratio(w, moments, ratio)
    assert abs(float(done.mask.float().mean()) - (1 - ratio)) < 1e-3
    assert loss(w, done.weight, x) <= loss(w, w * ratio_mask(wanda(w, moments), ratio), x)
    if ratio == 0.5:
        assert loss(w, done.weight, x) < loss(w, sparsegpt(w, moments, 4, 8).weight, x) < loss(w, sparsegpt(w, moments, 2, 4).weight, x)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (6, 8)])
@pytest.mark.parametrize("offset", ["none", "integer", "affine", "auto"])
def test_survivors_are_quantized_by_the_same_statistics(n: int, m: int, offset: str) -> None:
    w, moments, x = layer(k=192)
    params = Bipolar(bits=3, group=32, offset=offset)
    done = sparsegpt_quantized(w, moments, n, m, params)
    assert done.values.shape == (len(w), 192 * n // m)
    assert (done.mask.view(len(w), -1, m).sum(-1) == n).all()
    assert torch.equal(done.weight[done.mask].view(len(w), -1), bipolar.unpack(done.values)[:, : 192 * n // m])
    assert (done.weight[~done.mask] == 0).all()
    pruned = sparsegpt(w, moments, n, m)
    assert torch.equal(done.mask, pruned.mask)
    after = torch.zeros_like(w)
    after[pruned.mask] = bipolar.unpack(search(pruned.weight[pruned.mask].view(len(w), -1), params)).flatten()
    assert loss(w, done.weight, x) < 0.97 * loss(w, after, x)


def test_eight_bits_are_nearly_pruning_alone() -> None:
    w, moments, x = layer(k=128)
    done, pruned = sparsegpt_quantized(w, moments, 2, 4, Bipolar(bits=8, group=0)), sparsegpt(w, moments, 2, 4)
    assert loss(w, done.weight, x) < 1.01 * loss(w, pruned.weight, x)


def test_bad_input_is_named() -> None:
    w, moments, _ = layer()
    with pytest.raises(WeightError, match="E-WGT-NM"):
        sparsegpt(w[:, :62], moments, 2, 4)
    with pytest.raises(WeightError, match="E-WGT-MASK"):
        sparsegpt(w, moments, 2, 4, mask=torch.ones_like(w, dtype=torch.bool))
    with pytest.raises(RecipeError, match="E-RCP-RATIO"):
        sparsegpt_ratio(w, moments, 1.0)
    with pytest.raises(RecipeError, match="E-RCP-PATTERN"):
        sparsegpt_quantized(w[:, :4], Moments(torch.eye(4), torch.zeros(4), torch.zeros(4), 1), 2, 4, Bipolar())
