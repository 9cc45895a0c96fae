"""Matryoshka: neutral setting, ragged ranks, agreement with the pure functions, bytes, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effllm.errors import CacheError
from effllm.runtime.caches.base import parse
from effllm.runtime.caches.layer import Layer
from effllm.runtime.caches.matryoshka import Matryoshka, pack_tables
from effllm.solvers.kv.basis import Covariance, pca, truncate


def states(tokens: int = 260, dim: int = 32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(2, dim, dim, generator=g) * torch.logspace(0, -2, dim)
    k, v = (torch.randn(2, 2, tokens, dim, generator=g) @ mix.mT + 1 for _ in range(2))
    return k, v


def tables(k: Tensor, v: Tensor) -> list[Tensor]:
    sides = []
    for x in (k, v):
        c = Covariance()
        c.add(x)
        sides += [pca(c.centred), c.mean]
    return pack_tables(*sides)


def filled(spec: str, k: Tensor, v: Tensor, given: list[Tensor]) -> Layer:
    layer = Layer(spec, k.shape[2], given)
    layer.allocate(k, v)
    layer.append(k, v)
    return layer


def test_full_rank_is_dense() -> None:
    k, v = states()
    for got, x in zip(filled("matryoshka(k=full,v=full)", k, v, tables(k, v)).read(), (k, v), strict=True):
        torch.testing.assert_close(got[:, :, :260], x, rtol=1e-5, atol=2e-5)


def test_ragged_ranks_restore_each_head_from_its_own() -> None:
    k, v = states()
    given = tables(k, v)
    layer = filled("matryoshka(k=5/20,v=31/1)", k, v, given)
    flushed = int(layer.lens[1])
    for i, (got, x, ranks) in enumerate(zip(layer.read(), (k, v), ((5, 20), (31, 1)), strict=True)):
        expected = truncate(x, given[2 * i], given[2 * i + 1], torch.tensor(ranks))
        torch.testing.assert_close(got[:, :, :flushed], expected[:, :, :flushed], rtol=1e-5, atol=2e-5)
        assert flushed > 0 and torch.equal(got[:, :, flushed:260], x[:, :, flushed:])


def test_error_falls_with_rank() -> None:
    k, v = states()
    given = tables(k, v)
    q = torch.randn(2, 4, 1, 32, generator=torch.Generator().manual_seed(3))
    true = filled("matryoshka(k=full,v=full)", k, v, given).attend(q, kernel="reference")
    errors = [float((filled(f"matryoshka(k={r},v={r})", k, v, given).attend(q, kernel="reference") - true).norm()) for r in (4, 8, 16, 24, 32)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-4 < errors[-2]


def test_bytes_are_the_ranks() -> None:
    f = parse("matryoshka(k=0.5,v=48/32/16)")
    assert isinstance(f, Matryoshka) and f.ranks(3, 64) == ([32] * 3, [48, 32, 16])
    layout = f.layout(3, 64, torch.bfloat16)
    assert layout.payload == f.page * 2 * (96 + 96) and layout.page <= 1.01 * layout.payload


def test_bad_input() -> None:
    for setting in ("k=0", "k=a", "k=nan", "v=inf/2", "v=1.5"):
        with pytest.raises(CacheError) as caught:
            parse(f"matryoshka({setting})")
        assert caught.value.code == "E-KVC-VALUE"
    k, v = states(10)
    for spec in ("matryoshka(k=33)", "matryoshka(k=8/8/8)"):
        with pytest.raises(CacheError, match="E-KVC-SHAPE"):
            Layer(spec, 10, tables(k, v)).allocate(k, v)
    with pytest.raises(CacheError, match="E-KVC-BASIS"):
        Layer("matryoshka(k=8)", 10).allocate(k, v)
    with pytest.raises(CacheError, match="E-KVC-BASIS"):
        pack_tables(torch.ones(2, 4, 4), torch.zeros(2, 4), torch.eye(4).repeat(2, 1, 1), torch.zeros(2, 4))
