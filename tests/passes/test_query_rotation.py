"""Turning queries instead of keys in compiled attention: the same result, once, and a reason where it is not done."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import effllm
from effllm import backend
from effllm.backend import Options, capture
from effllm.lowering import providers
from effllm.passes.base import Context
from effllm.passes.query_rotation import QueryRotation
from effllm.recipe import Recipe
from effllm.runtime.rotary import shift_angles, turns

providers.load("cpu")


class Attend(nn.Module):
    """Attention over keys that are turned as they are read, grouped heads repeated as models do."""

    def __init__(self, gathered: bool = False) -> None:
        super().__init__()
        self.gathered = gathered

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, row: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        source = torch.arange(k.shape[2]) if self.gathered else None
        k = torch.ops.effllm.pie_apply(k, source, row, cos, sin, "half", "reference")
        k, v = (t[:, :, None, :, :].expand(1, 2, 3, k.shape[2], 16).reshape(1, 6, k.shape[2], 16) for t in (k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.25)


def inputs(queries: int = 1) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 6, queries, 16, generator=g)
    k, v = (torch.randn(1, 2, 11, 16, generator=g) for _ in range(2))
    mask = torch.rand(1, 1, queries, 11, generator=g) > 0.2
    row = torch.randint(0, 3, (11,), generator=g, dtype=torch.int32)
    return q, k, v, mask, row, *turns(shift_angles([0, 7, -3], 10000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)))


def decisions(report: effllm.Report) -> list[effllm.Decision]:
    return next(p for p in report.passes if p.name == "query_rotation").decisions


@pytest.mark.parametrize("queries", [1, 3])
def test_few_queries_are_turned_instead_of_the_keys(queries: int) -> None:
    model, given = Attend(), inputs(queries)
    want = model(*given)
    torch.compiler.reset()
    with torch.no_grad():
        got = torch.compile(model, backend="effllm", options={"recipe": "dense", "inner": "eager"})(*given)
    (found,) = decisions(backend.last_report())
    assert found.action == "applied" and found.config == {"queries": queries, "table": 3}
    assert (got - want).abs().max() < 1e-5


def test_a_second_run_changes_nothing() -> None:
    done = capture(Attend(), inputs(), Options.parse({"recipe": "dense"}, None))
    assert done is not None
    targets = [str(n.target) for n in done.gm.graph.nodes]
    assert "effllm.rotated_attention.default" in targets and not any("pie_apply" in t for t in targets)
    assert QueryRotation().run(done.gm.graph, Context(Recipe.parse("dense"))).decisions == []


@pytest.mark.parametrize(("model", "queries", "code"), [(Attend(), 5, "many-queries"), (Attend(gathered=True), 1, "gathered")])
def test_kept_with_the_reason(model: nn.Module, queries: int, code: str) -> None:
    (found,) = decisions(effllm.explain(model, inputs(queries), "dense"))
    assert (found.action, found.code) == ("kept", code) and found.reason
