"""Siblings in one call: with and without biases, packed and in every form of low-rank factors; what stays apart, and why."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effllm
from effllm.report import Decision


class Siblings(nn.Module):
    """Query, key and value as Qwen2 has them; `biased` says which carry a bias."""

    def __init__(self, biased: str = "qkv", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(64, n, name in biased, dtype=dtype) for name, n in (("q", 64), ("k", 48), ("v", 48)))
        for linear in (self.q, self.k, self.v):
            if linear.bias is not None:
                nn.init.normal_(linear.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x), self.v(x)


def merged(model: nn.Module, recipe: str, x: Tensor) -> list[Decision]:
    with torch.no_grad():
        report = effllm.explain(model, (x,), recipe, max_slowdown=1e9)
    return [d for p in report.passes if p.name in ("merge_linear", "merge_lowrank") for d in p.decisions]


def far(found: Any, wanted: Any) -> float:
    return max(float((a.detach().double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("biased", ["", "qkv", "k"])
@pytest.mark.parametrize(
    "recipe",
    ["svd(rank=16)", "svd(rank=17, pivoted=false)", "svd(rank=16, pivoted=false, bits=6)", "w4(offset=none)", "w4a8(offset=integer)", "w8(offset=affine)"],
)
@pytest.mark.parametrize("rows", [1, 5])
def test_siblings_run_in_one_call_and_mean_the_same(recipe: str, biased: str, rows: int) -> None:
    model, x = Siblings(biased), torch.randn(rows, 64)
    found = merged(model, recipe, x)
    assert [d.action for d in found] == ["applied"] and found[0].reason.startswith(("3 low-rank", "3 linears")), found
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(model, backend="effllm", options={"inner": "eager", "recipe": recipe, "max_slowdown": 1e9})(x)
        packed = copy.deepcopy(model)
        effllm.compress(packed, recipe)
        wanted = packed(x)
    assert far(got, wanted) < 1e-5 and all(g.is_contiguous() for g in got)
    if biased:  # the biases are a large part of the outputs
        assert far([y - (0 if m.bias is None else m.bias) for y, m in zip(got, (model.q, model.k, model.v), strict=True)], wanted) > 0.1


@pytest.mark.parametrize("recipe", ["svd(rank=24, pivoted=false)", "w4(offset=none)"])
def test_bf16_rounds_the_bias_like_plain_torch(recipe: str) -> None:
    model, x = Siblings("qkv", torch.bfloat16), torch.randn(3, 64).bfloat16()
    torch._dynamo.reset()
    packed = copy.deepcopy(model)
    effllm.compress(packed, recipe)
    dense = [m.weight.dense(torch.float64) @ x.double().T for m in (packed.q, packed.k, packed.v)]
    exact = [y.T + m.bias.double() for y, m in zip(dense, (model.q, model.k, model.v), strict=True)]
    with torch.no_grad():
        got = torch.compile(packed, backend="effllm", options={"inner": "eager", "recipe": "dense"})(x)
        apart = packed(x)
    assert far(got, exact) <= 2 * far(apart, exact) + 2**-9


@pytest.mark.parametrize("recipe", ["svd(rank=16)", "w4(offset=none)"])
def test_what_stays_apart_says_why(recipe: str) -> None:
    mixed, x = Siblings("qk"), torch.randn(2, 64).bfloat16()
    mixed.to(torch.bfloat16).k.bias.data = mixed.k.bias.data.float()

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mixed
            effllm.compress(self.inner, recipe)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y: tuple[Tensor, Tensor, Tensor] = self.inner(x)
            return y

    found = merged(Cast(), "dense", x)
    assert sorted((d.action, d.code) for d in found) == [("applied", "merged"), ("kept", "not-mergeable")]
    assert "its bias is torch.float32 beside outputs of torch.bfloat16" in next(d.reason for d in found if d.action == "kept")
