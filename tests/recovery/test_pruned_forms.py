"""TRP and ordered dropout on packed weights: pivoted rows, folded channels, a sparse part, and integer codes, which refuse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import effllm
from effllm.errors import RecoveryError
from effllm.recovery.ordered import Ordered
from effllm.recovery.pivoted import folded, plain_forms, unfolded
from effllm.recovery.select import pairs
from effllm.recovery.truncation import Truncation
from effllm.runtime.formats import dense as dense_format
from effllm.runtime.formats import lowrank
from effllm.runtime.packed import PackedLinear
from tests.recovery.models import dense, windows

FAST: dict[str, Any] = {"batch": 4, "lr": 1e-3, "precision": "fp32"}
RECIPES = {
    "pivoted": "svd(rank=18)",
    "plain": "svd(rank=14, pivoted=false)",
    "channels": "lost(ratio=0.8, density=0.1, pivoted=false)",
    "sparse": "sltrain(ratio=0.9, density=0.05)",
}


def packed(kind: str) -> tuple[nn.Module, nn.Module]:
    teacher = dense()
    model = copy.deepcopy(teacher)
    effllm.compress(model, RECIPES[kind], windows())
    return teacher, model


def linears(model: nn.Module) -> dict[str, PackedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}


def stored(module: PackedLinear) -> dict[str, torch.Tensor]:
    return {k: t.clone() for k, t in module.weight.packed().tensors.items()}


@pytest.mark.parametrize("shape", [(9, 13, 4), (13, 9, 8), (5, 7, 1)])
def test_unfolding_and_folding_keep_the_values(shape: tuple[int, int, int]) -> None:
    n, k, rank = shape
    torch.manual_seed(0)
    pivots = torch.randperm(n)[:rank].sort().values
    a, b = (dense_format.make(t) for t in (torch.randn(n - rank, rank), torch.randn(rank, k)))
    old = lowrank.make(a, b, shape=(n, k), pivots=pivots, shift=torch.randn(n))
    plain = unfolded(old)
    assert "pivots" not in plain.tensors and torch.equal(plain.tensors["shift"], old.tensors["shift"])
    assert torch.equal(lowrank.unpack(plain), lowrank.unpack(old))
    again = folded(plain)
    assert again.attrs["rank"] == rank and "pivots" in again.tensors and again.nbytes == old.nbytes
    assert torch.allclose(lowrank.unpack(again), lowrank.unpack(old), rtol=1e-5, atol=1e-5)


def test_untouched_weights_come_back_bit_for_bit_after_an_error_too() -> None:
    _, model = packed("pivoted")
    before = {n: stored(m) for n, m in linears(model).items()}
    with pytest.raises(KeyboardInterrupt), plain_forms(model) as count:
        assert count == len(before) == 7 and all("pivots" not in m.weight.packed().tensors for m in linears(model).values())
        raise KeyboardInterrupt
    for name, module in linears(model).items():
        assert all(torch.equal(t, before[name][key]) for key, t in stored(module).items())


@pytest.mark.parametrize("kind", RECIPES)
def test_truncation_prunes_every_form(kind: str) -> None:
    teacher, model = packed(kind)
    before = {n: (m.weight.attrs["rank"], set(stored(m)), m.weight.nbytes) for n, m in linears(model).items()}
    report = effllm.recover(model, teacher, windows(), 6, truncation=Truncation(period=3, energy=0.7), **FAST)
    assert len(report.ranks) == 7
    for name, module in linears(model).items():
        rank, names, nbytes = before[name]
        weight = module.weight
        left = report.ranks[f"{name}.weight"]
        assert weight.attrs["rank"] == left < rank and set(stored(module)) == names and weight.nbytes < nbytes
        values = weight.packed()
        if kind == "channels":
            assert values.tensors["channels"].numel() == values.tensors["a.values"].shape[1] - left
        if kind in ("pivoted", "plain"):
            assert torch.linalg.matrix_rank(weight.dense(torch.float64), rtol=1e-5) == left
        assert not any(p.requires_grad for p in weight.parameters())


@pytest.mark.parametrize("kind", RECIPES)
def test_ordered_dropout_cuts_what_is_small(kind: str) -> None:
    teacher, model = packed(kind)
    report = effllm.recover(model, teacher, windows(), 3, ordered=Ordered(cut=0.0), **FAST | {"lr": 1e-6})
    for name, module in linears(model).items():
        assert report.ranks[f"{name}.weight"] == module.weight.attrs["rank"]
    # nothing was cut, and a step of 1e-6 leaves the values where they were: dropped ranks came back
    dense_now = [m.weight.dense(torch.float32) for m in linears(model).values()]
    _, fresh = packed(kind)
    for now, was in zip(dense_now, linears(fresh).values(), strict=True):
        assert torch.allclose(now, was.weight.dense(torch.float32), atol=1e-3)
    _, model = packed(kind)
    report = effllm.recover(model, teacher, windows(), 3, ordered=Ordered(cut=0.99), **FAST)
    assert any(report.ranks[f"{n}.weight"] < m.weight.attrs["rank"] for n, m in linears(fresh).items())


def test_the_nuclear_norm_leaves_folded_channels_alone() -> None:
    _, model = packed("channels")
    pair = pairs(model)[0]
    assert pair.a.shape[1] > pair.rank == pair.left.shape[1]
    teacher, other = packed("channels")
    options: dict[str, Any] = FAST | {"lr": 1e-2, "loss": {"kl": 1e-9, "features": 0.0}, "clip": None}
    effllm.recover(other, teacher, windows(), 4, truncation=Truncation(period=100, energy=1.0, nuclear=1e3), **options)

    def sizes(m: nn.Module) -> tuple[float, torch.Tensor]:
        t, rank = linears(m)["layers.0.up"].weight.packed().tensors, pair.rank
        return float(torch.linalg.svdvals(t["a.values"][:, :rank] @ t["b.values"]).sum()), t["a.values"][:, rank:]

    (before, channels), (after, kept) = sizes(model), sizes(other)
    assert after < 0.99 * before
    assert float((kept - channels).norm()) < 0.1 * float(channels.norm())


def test_integer_codes_refuse_or_are_named() -> None:
    teacher = dense()
    model = copy.deepcopy(teacher)
    effllm.compress(model, "svd(rank=16, bits=8, pivoted=false)")
    for options in ({"truncation": Truncation()}, {"ordered": Ordered()}):
        with pytest.raises(RecoveryError, match="E-REC") as caught:
            effllm.recover(model, teacher, windows(), 1, what="all", **options, **FAST)
        assert caught.value.code == "E-REC-PAIR" and "integer codes" in caught.value.cause
    mixed = copy.deepcopy(teacher)
    rules = [{"match": "*.up", "method": "svd", "rank": 16, "bits": 8}, {"match": "*.down", "method": "svd", "rank": 12}]
    effllm.compress(mixed, {"rules": rules})
    report = effllm.recover(mixed, teacher, windows(), 2, truncation=Truncation(period=1, energy=0.5), **FAST)
    assert len(report.ranks) == 3 and any("3 low-rank weights hold integer codes" in note for note in report.notes)
