"""SparseLowRankLinear and ChannelLowRankLinear: gradients against finite differences and the dense equivalent, supports, errors."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from effllm.errors import OptionError, WeightError
from effllm.recovery import sparse_low_rank
from effllm.recovery.channel_low_rank import ChannelLowRankLinear
from effllm.recovery.select import pairs, selected
from effllm.recovery.sparse_low_rank import SparseLowRankLinear, uniform_support


def layer(k=7, n=11, rank=3, density=0.2, **options):
    made = SparseLowRankLinear(k, n, rank, density, alpha=6.0, dtype=torch.float64, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        made.a.normal_()
    return made


def through_dense(m, x):
    s = torch.zeros(m.out_features * m.in_features, dtype=m.values.dtype).index_put((m.flat_support(),), m.values)
    w = m.scale * m.a @ m.b + s.view(m.out_features, m.in_features)
    return F.linear(x, w, m.bias)


@pytest.mark.parametrize("tile", [4, 256])
def test_gradients_against_finite_differences(tile, monkeypatch):
    monkeypatch.setattr(sparse_low_rank, "_TILE", tile)
    m = layer()
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)

    def f(x, a, b, values):
        return sparse_low_rank._Product.apply(x, a, b, values, m.columns, m.offsets, m.scale)

    assert torch.autograd.gradcheck(f, (x, m.a, m.b, m.values))


@pytest.mark.parametrize("tile", [4, 256])
@pytest.mark.parametrize(("k", "n", "density", "bias"), [(7, 11, 0.2, True), (1, 9, 0.5, False), (9, 1, 0.5, True), (6, 8, 0.0, True), (5, 4, 0.99, False)])
def test_values_and_gradients_equal_the_dense_equivalent(tile, k, n, density, bias, monkeypatch):
    monkeypatch.setattr(sparse_low_rank, "_TILE", tile)
    m = layer(k, n, 1, density, bias=bias)
    x = torch.randn(2, 3, k, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 3, n, dtype=torch.float64)
    want, got = through_dense(m, x), m(x)
    torch.testing.assert_close(got, want)
    leaves = [x, *m.parameters()]
    for a, b in zip(torch.autograd.grad(got, leaves, g), torch.autograd.grad(want, leaves, g), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(F.linear(x, m.dense(), m.bias), want)


def test_nothing_dense_is_kept_for_the_backward_pass():
    m, saved = SparseLowRankLinear(64, 512, 4, 0.02), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        y = m(torch.randn(3, 64))
    assert saved and max(saved) <= 512 * 4
    y.square().sum().backward()
    assert sum(p.grad.numel() for p in m.parameters()) < 64 * 512 // 8


@pytest.mark.parametrize(("size", "count"), [(1000, 30), (1000, 499), (1000, 900), (10, 0), (1, 1), (2**33, 1000)])
def test_support_is_unique_sorted_and_seeded(size, count):
    def draw(seed):
        return uniform_support(size, count, torch.Generator().manual_seed(seed))

    at = draw(0)
    assert len(at) == count and (at.diff() > 0).all() and (count == 0 or 0 <= int(at[0]) <= int(at[-1]) < size)
    assert torch.equal(at, draw(0)) and (count in (0, size) or not torch.equal(at, draw(1)))


def test_support_is_uniform():
    hits = torch.zeros(20)
    for seed in range(2000):
        hits[uniform_support(20, 5, torch.Generator().manual_seed(seed))] += 1
    # each position is a binomial count of 2000 draws at 1/4: six standard deviations are 116
    assert float((hits - 500).abs().max()) < 116


def test_support_never_changes_in_training():
    m = layer()
    at, adam = m.flat_support(), torch.optim.Adam(m.parameters(), lr=0.1)
    for _ in range(3):
        m(torch.randn(4, 7, dtype=torch.float64)).square().sum().backward()
        adam.step()
    assert torch.equal(m.flat_support(), at)
    off = (m.dense() - m.scale * m.a @ m.b).flatten()
    off[at] = 0
    assert float(off.detach().abs().max()) < 1e-12


def test_starts_as_sltrain_does_and_from_a_dense_weight():
    m = SparseLowRankLinear(100, 60, 8, 0.05, alpha=16.0)
    assert (m.a == 0).all() and m.scale == 2 and float(m.values.detach().abs().max()) <= 0.1 and len(m.values) == 300
    w = torch.randn(30, 20, dtype=torch.float64)
    full = SparseLowRankLinear.from_dense(w, 20, 0.1)
    torch.testing.assert_close(full.dense(), w)
    m = SparseLowRankLinear.from_dense(w, 5, 0.2, seed=3)
    at = m.flat_support()
    torch.testing.assert_close(m.dense().flatten()[at], w.flatten()[at])
    _u, s, _vh = torch.linalg.svd(w)
    assert float((m.dense() - w).norm()) < float(s[5:].norm())
    m.shrink(2)
    assert m.a.shape == (30, 2) and m(torch.randn(3, 20, dtype=torch.float64)).shape == (3, 30)


def test_autocast_and_selection():
    m = SparseLowRankLinear(16, 24, 4, 0.1)
    with torch.no_grad():
        m.a.normal_()
    x = torch.randn(5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = m(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and all(p.grad.dtype == torch.float32 for p in m.parameters())
    torch.testing.assert_close(y.float(), m(x), rtol=0.05, atol=0.05)
    holder = torch.nn.ModuleDict({"x": m})
    assert set(selected(holder, "factors").parameters) == {"x.a", "x.b", "x.values"} and len(pairs(holder)) == 1


@pytest.mark.parametrize("bad", [{"rank": 0}, {"rank": 8}])
def test_bad_ranks(bad):
    with pytest.raises(WeightError, match="E-WGT-RANK"):
        layer(**bad)
    with pytest.raises(WeightError, match="E-WGT-RANK"):
        ChannelLowRankLinear(7, 11, bad["rank"], torch.tensor([0]))


def test_bad_supports():
    with pytest.raises(WeightError, match="E-WGT-SPARSE"):
        layer(density=1.0)
    for channels in ([7], [-1], [1, 1], [[0, 1]]):
        with pytest.raises(WeightError, match="E-WGT-SPARSE"):
            ChannelLowRankLinear(7, 11, 2, torch.tensor(channels))
    for wrong in ({"gamma": 1.5}, {"between": "relu"}):
        with pytest.raises(OptionError, match="E-OPT-LOST"):
            ChannelLowRankLinear(7, 11, 2, torch.tensor([0]), **wrong)
    with pytest.raises(WeightError, match="E-WGT-SPARSE"):
        ChannelLowRankLinear.from_dense(torch.randn(11, 7), 2, 8)


@pytest.mark.parametrize("gamma", [None, 0.9, 1.0])
@pytest.mark.parametrize("between", ["identity", "silu"])
def test_channel_form(gamma, between):
    m = ChannelLowRankLinear(7, 11, 3, torch.tensor([5, 1]), gamma=gamma, between=between, dtype=torch.float64)
    torch.manual_seed(2)
    with torch.no_grad():
        m.a.normal_()
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    low = x @ m.b.t()
    low = (F.silu(low) if between == "silu" else low) @ m.a.t()
    picked = x[:, [1, 5]] @ m.s.t()
    want = low + picked if gamma is None else gamma * low + (1 - gamma) * picked
    torch.testing.assert_close(m(x), want + m.bias)
    names = [n for n, _ in m.named_parameters()]
    assert torch.autograd.gradcheck(lambda x, *ps: torch.func.functional_call(m, dict(zip(names, ps, strict=True)), (x,)), (x, *m.parameters()))
    if between == "identity":
        torch.testing.assert_close(F.linear(x, m.dense(), m.bias), want + m.bias)
    else:
        with pytest.raises(OptionError, match="E-OPT-LOST"):
            m.dense()


def test_channel_form_of_a_dense_weight():
    w = torch.randn(12, 9, dtype=torch.float64)
    w[:, 4] *= 10
    m = ChannelLowRankLinear.from_dense(w, 2, 3)
    torch.testing.assert_close(m.dense()[:, m.channels], w[:, m.channels])
    u, s, vh = torch.linalg.svd(w)
    left = w - (u[:, :2] * s[:2]) @ vh[:2]
    assert set(m.channels.tolist()) == set(left.norm(dim=0).topk(3).indices.tolist())
    torch.testing.assert_close(ChannelLowRankLinear.from_dense(w, 9, 0).dense(), w)
    alone = ChannelLowRankLinear.from_dense(w, 2, 3, gamma=1.0)
    torch.testing.assert_close(alone.dense(), w - left)
    torch.testing.assert_close(ChannelLowRankLinear.from_dense(w, 2, 3, gamma=0.0).dense()[:, m.channels], w[:, m.channels])
