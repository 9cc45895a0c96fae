"""K-sort: all three ways leave logits as they are, and help where they can."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effllm.errors import CacheError
from effllm.runtime.formats.kv import bfp
from effllm.solvers.kv import ksort

H, G, D, T = 4, 2, 64, 40


def rotate(x: Tensor, freq: Tensor) -> Tensor:
    """The half-split rotation of x (B, H, T, R) with frequencies (R / 2,)."""
    angle = torch.arange(x.shape[2], dtype=torch.float64)[:, None] * freq
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def weights(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    wq, wk = (torch.randn(n * D, 48, generator=g, dtype=torch.float64) for n in (H, G))
    wk[torch.randperm(G * D, generator=g)[:12]] *= 12  # outlier channels
    return wq, wk, torch.randn(1, T, 48, generator=g, dtype=torch.float64), 10000.0 ** (-torch.arange(D // 2, dtype=torch.float64) / (D // 2))


def heads(x: Tensor, w: Tensor, n: int) -> Tensor:
    return (x @ w.T).unflatten(-1, (n, -1)).transpose(1, 2)


def logits(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.repeat_interleave(H // G, 1).mT


def test_pair_way_moves_weights_and_frequencies() -> None:
    wq, wk, x, freq = weights()
    before = logits(rotate(heads(x, wq, H), freq), rotate(heads(x, wk, G), freq))
    shared = ksort.pair_order(ksort.head_energy(wk, G).sum(0))  # one table of angles: one order
    order = ksort.pairs_to_channels(shared, D).expand(G, D)
    wq2, wk2 = ksort.permute_rows(wq, order, H), ksort.permute_rows(wk, order, G)
    after = logits(rotate(heads(x, wq2, H), freq[shared]), rotate(heads(x, wk2, G), freq[shared]))
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-9)
    unmoved = logits(rotate(heads(x, wq2, H), freq), rotate(heads(x, wk2, G), freq))
    assert float((unmoved - before).abs().max()) > 1  # sorting without the frequencies is wrong


@pytest.mark.parametrize("way", [ksort.channel_order, ksort.layout_order])
def test_orders_after_the_rotation(way) -> None:  # type: ignore[no-untyped-def]
    wq, wk, x, freq = weights(1)
    q, k = rotate(heads(x, wq, H), freq), rotate(heads(x, wk, G), freq)
    order = way(k.square().mean((0, 2)))
    assert torch.equal(order.sort(-1).values, torch.arange(D).expand(G, D))
    q2, k2 = ksort.reorder(q, order), ksort.reorder(k, order)
    torch.testing.assert_close(logits(q2, k2), logits(q, k), rtol=1e-10, atol=1e-9)
    for h in range(H):  # query heads follow their own key head
        assert torch.equal(q2[:, h], q[:, h][..., order[h // 2]])


def test_sorted_blocks_lose_less_and_whole_heads_the_same() -> None:
    _, wk, x, freq = weights(2)
    k = rotate(heads(x, wk, G), freq)
    energy = k.square().mean((0, 2))
    gain = {}
    for block in (16, 32, 64):
        error = [float((bfp.decode(bfp.encode(t, 4, block), 4, torch.float64) - t).norm()) for t in (
            k, ksort.reorder(k, ksort.channel_order(energy)), ksort.reorder(k, ksort.layout_order(energy)),
        )]  # fmt: skip
        gain[block] = (error[1] / error[0], error[2] / error[0])
    assert max(gain[16]) < 0.9 and max(gain[32]) < 0.95
    assert gain[64] == pytest.approx((1.0, 1.0), rel=1e-12)


def test_pairs_alone_do_not_help_blocks_of_half_a_head() -> None:
    _, wk, x, freq = weights(3)
    order = ksort.pair_order(ksort.head_energy(wk, G).sum(0))
    k = rotate(heads(x, wk, G), freq)
    moved = ksort.reorder(k, ksort.pairs_to_channels(order, D).expand(G, D))
    errors = [float((bfp.decode(bfp.encode(t, 4, D // 2), 4, torch.float64) - t).square().sum()) for t in (k, moved)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-12)


def test_partial_rotation_keeps_its_boundary() -> None:
    energy = torch.rand(G, D, generator=torch.Generator().manual_seed(4))
    for order in (ksort.channel_order(energy, 32), ksort.layout_order(energy, 32), ksort.pairs_to_channels(ksort.pair_order(energy, 32), D)):
        assert (order[:, :32] < 32).all() and (order[:, 32:] >= 32).all()
        assert torch.equal(order.sort(-1).values, torch.arange(D).expand(G, D))
    with pytest.raises(CacheError, match="E-KVC-ROTARY"):
        ksort.pair_order(energy, 31)


def test_weights_decide_where_keys_alone_mislead() -> None:
    """The channels with the largest keys are read most: sorting by keys puts them into one coarse block."""
    energy = torch.tensor([100.0, 1, 1, 1, 9, 9, 1, 1])
    weight = torch.tensor([1.0, 1, 1, 1, 50, 50, 1, 1])
    blind, seen = ksort.channel_order(energy, None, None, 4), ksort.channel_order(energy, None, weight, 4)
    assert seen.sort().values.tolist() == list(range(8))
    assert ksort.cost(energy, blind, weight, 4) == 100 * (1 + 50 + 50 + 1) + 1 * 4
    assert ksort.cost(energy, seen, weight, 4) == 100 * 4 + 9 * (50 + 50 + 1 + 1)  # the outlier sits with what nobody reads
    g = torch.Generator().manual_seed(3)
    q, k = torch.randn(1, 1, 64, 8, generator=g) * weight.sqrt(), torch.randn(1, 1, 64, 8, generator=g) * energy.sqrt()
    errors = []
    for order in (blind, seen):
        kept = bfp.decode(bfp.encode(ksort.reorder(k, order[None]), 4, 4), 4)
        errors.append(float((ksort.reorder(q, order[None]) @ (kept - ksort.reorder(k, order[None])).mT).norm()))
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("block", [2, 4])
def test_two_blocks_are_split_as_well_as_can_be(block: int) -> None:
    from itertools import combinations

    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        energy, weight = torch.rand(2 * block, generator=g).exp(), torch.rand(2 * block, generator=g)
        every = [torch.tensor([*c, *(i for i in range(2 * block) if i not in c)]) for c in combinations(range(2 * block), block)]
        best = min(float(ksort.cost(energy, order, weight, block)) for order in every)
        assert float(ksort.cost(energy, ksort.block_order(energy, weight, block), weight, block)) == pytest.approx(best)
    with pytest.raises(CacheError, match="E-KVC-GROUP"):
        ksort.block_order(energy, weight, block + 1)


def test_weighted_orders_stay_exact_and_keep_pairs() -> None:
    energy, weight = (torch.rand(G, 96, generator=torch.Generator().manual_seed(s)) for s in (5, 6))
    for way in (ksort.channel_order, ksort.layout_order):
        order = way(energy, 64, weight, 16)
        assert torch.equal(order.sort(-1).values, torch.arange(96).expand(G, 96))
        assert (order[:, :64] < 64).all()
    pairs = ksort.layout_order(energy, 64, weight, 16)[:, :64].unflatten(-1, (-1, 2))
    assert torch.equal(pairs[..., 1], pairs[..., 0] + 32)
    assert ksort.channel_order(energy, None, weight, 32).shape == (G, 96)  # three blocks
