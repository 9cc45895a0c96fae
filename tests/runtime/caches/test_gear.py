"""GEAR: its parts by themselves, neutral settings, and the three defects of the released code."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from effllm.errors import CacheError
from effllm.runtime.caches.base import parse
from effllm.runtime.caches.gear import Gear, extremes, fill, power_iteration
from effllm.runtime.caches.kivi import Kivi


def page(seed: int, batch: int = 1, tokens: int = 64, dim: int = 64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shape = (batch, 2, tokens, dim)
    return tuple(torch.randn(shape, generator=g) * torch.exp(torch.randn(batch, 2, 1, dim, generator=g)) for _ in range(2))  # type: ignore[return-value]


def error(fmt: Kivi, k: Tensor, v: Tensor) -> Tensor:
    """Relative error of keys and values per item of the batch."""
    out = fmt.decode(fmt.encode(k, v, []), [])
    return torch.stack([(a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1) for a, b in zip(out, (k, v), strict=True)])


def test_without_rank_and_outliers_it_is_kivi() -> None:
    k, v = page(0)
    ours = Gear(bits=2, rank=0, outliers=0.0)
    held, plain = ours.encode(k, v, []), Kivi(bits=2).encode(k, v, [])
    assert all(torch.equal(held[name], plain[name]) for name in plain)
    assert ours.bytes_per_token(2, 64, torch.bfloat16) == Kivi(bits=2).bytes_per_token(2, 64, torch.bfloat16)


def test_full_rank_and_all_outliers_are_exact() -> None:
    k, v = page(1)
    assert error(Gear(bits=2, rank=64, outliers=0.0), k, v).max() < 2e-3  # factors in fp16
    assert error(Gear(bits=2, rank=2, outliers=1.0), k, v).max() < 5e-4  # corrections in fp16


def test_more_rank_and_more_outliers_lose_less() -> None:
    k, v = page(2)
    by_rank = [error(Gear(bits=2, rank=r, outliers=0.0), k, v) for r in (0, 1, 2, 4, 8, 16)]
    by_share = [error(Gear(bits=2, rank=0, outliers=s), k, v) for s in (0.0, 0.02, 0.1, 0.3)]
    for row in (by_rank, by_share):
        assert all((b < a).all() for a, b in itertools.pairwise(row))


def test_bytes_as_factors_cost_little() -> None:
    """e5m2 rounds an element by at most 1/8 of it, 5 % in the mean square; what is corrected is lost by that share only."""
    k, v = page(9)
    none, half, byte = (error(Gear(bits=2, outliers=0.0, **more), k, v) for more in ({"rank": 0}, {"rank": 4}, {"rank": 4, "factors": 8}))
    corrected = none.square() - half.square()
    assert (byte.square() - half.square() < 0.02 * corrected).all() and (byte > half).all()
    assert error(Gear(bits=2, outliers=1.0, factors=8), k, v).max() < 5e-4  # corrections know of the rounding


def test_power_iteration_is_near_the_best_and_orthonormal() -> None:
    g = torch.Generator().manual_seed(3)
    e = torch.randn(4, 64, 48, generator=g)
    for rank in (1, 2, 4):
        a, b = power_iteration(e, rank, 3)
        left = (e - a @ b.mT).flatten(1).norm(dim=1)
        best = torch.linalg.svdvals(e)[:, rank:].norm(dim=1)
        assert (left >= best * (1 - 1e-5)).all() and (left <= 1.06 * best).all()
        assert torch.allclose(a.mT @ a, torch.eye(rank).expand(4, rank, rank), atol=1e-5)
    zero = power_iteration(torch.zeros(1, 8, 8), 2, 3)
    assert not any(t.any() for t in zero)


def test_scores_by_factors_equal_the_product() -> None:
    k, v = page(4)
    fmt = Gear(bits=4, rank=3)
    held = fmt.encode(k, v, [])
    keys, _ = fmt.decode(held, [])
    base, _ = Kivi(bits=4).decode({n: held[n] for n in ("kcodes", "kscale", "kmin", "vcodes", "vscale", "vmin")}, [])
    q = torch.randn(1, 2, 5, 64, generator=torch.Generator().manual_seed(5))
    low = (q @ held["kb"].float().mT) @ held["ka"].float()
    sparse = torch.zeros(1, 2, 64, 64).scatter_add(-1, held["kidx"].long(), held["kval"].float()).mT  # (tokens, channels)
    assert torch.allclose(q @ base.mT + low + q @ sparse.mT, q @ keys.mT, rtol=1e-4, atol=1e-4)


def test_outliers_are_the_ends_of_each_vector() -> None:
    x = torch.arange(24.0).reshape(8, 3).flip(0)
    index = extremes(x, 4)
    assert sorted(index[:, 0].tolist()) == [0, 1, 6, 7]
    filled = fill(x, index)
    assert torch.equal(filled[[0, 1, 6, 7]], x.mean(0).expand(4, 3)) and torch.equal(filled[2:6], x[2:6])
    for x in (torch.randn(3, 16, 5, generator=torch.Generator().manual_seed(1)), torch.zeros(1, 8, 3), torch.arange(4.0).repeat(3)[:, None]):
        order = x.sort(dim=-2, stable=True).indices
        assert torch.equal(extremes(x, 2), torch.stack([order[..., 0, :], order[..., -1, :]], -2))
    assert extremes(torch.zeros(6, 2), 6).sort(0).values.tolist() == [[i, i] for i in range(6)]


def test_released_code_used_the_basis_of_the_first_item_for_all() -> None:
    k, v = page(6, batch=3)
    fmt = Gear(bits=2, rank=4, outliers=0.0)
    together, alone = error(fmt, k, v), torch.cat([error(fmt, k[i : i + 1], v[i : i + 1]) for i in range(3)], 1)
    assert torch.allclose(together, alone, rtol=1e-6)
    e = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(7))
    a, _ = power_iteration(e, 4, 3)
    shared = e - a[:1] @ (a[:1].mT @ e)  # what a shared basis would leave
    own = e - a @ (a.mT @ e)
    assert (own.flatten(1).norm(dim=1)[1:] < 0.97 * shared.flatten(1).norm(dim=1)[1:]).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_released_code_had_wrong_levels(bits: int) -> None:
    # bits^2 - 1 levels: 63 at 8 bits
    k, v = page(8)
    held = Gear(bits=bits, rank=0, outliers=0.0).encode(k, v, [])
    from effllm.runtime.caches.codes import unpack

    assert int(unpack(held["kcodes"], bits).max()) == 2**bits - 1


def test_released_code_counted_outliers_along_the_wrong_axis() -> None:
    # a share of heads * channels, applied to the tokens of a chunk, kept whole chunks
    fmt = Gear(outliers=0.02)
    assert fmt.counts(128) == (2, 4)
    for heads in (1, 32):
        fields = {f.name: f.shape for f in fmt.layout(heads, 128, torch.bfloat16).fields}
        assert fields["kidx"] == (128, 2) and fields["vidx"] == (64, 4)


@pytest.mark.parametrize(
    ("text", "share"),
    [("gear(bits=2,outliers=0)", 20.3), ("gear(bits=2,outliers=0,rank=0)", 15.6), ("gear(bits=2)", 25.0), ("gear(bits=2,factors=8)", 22.7)],
)
def test_bytes(text: str, share: float) -> None:
    assert parse(text).bytes_per_token(8, 128, torch.bfloat16) / (4 * 8 * 128) * 100 == pytest.approx(share, abs=0.06)


@pytest.mark.parametrize("text", ["gear(rank=-1)", "gear(outliers=1.5)", "gear(loops=0)", "gear(rank=65)", "gear(factors=4)"])
def test_bad_settings(text: str) -> None:
    with pytest.raises(CacheError, match="E-KVC-VALUE"):
        parse(text)
    with pytest.raises(CacheError, match="E-KVC-SHAPE"):
        parse("gear(page=512)")
