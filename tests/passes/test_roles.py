"""Roles of linears in the graphs of model families, found without names; and the joined gate."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from effllm import compat
from effllm.compression import compress
from effllm.passes.roles import Roles, roles
from tests.hf.families import tiny

SEVEN = {"q": 2, "k": 2, "v": 2, "o": 2, "gate": 2, "up": 2, "down": 2, "other": 1}
EXPECTED: dict[str, dict[str, int]] = {
    "llama": SEVEN, "qwen3": SEVEN, "mistral": SEVEN, "gemma2": SEVEN,  # gemma2 calls no attention op: a softmax between two products
    "phi3": {"qkv": 2, "o": 2, "gate_up": 2, "down": 2, "other": 1},
    "phi": {"q": 2, "k": 2, "v": 2, "o": 2, "other": 5},
}  # fmt: skip


def graph_of(model: Any) -> Roles:
    """The roles of a model's graph, which is not run."""
    found: list[Roles] = []

    def look(gm: Any, _: Any) -> Any:
        found.append(roles(gm.graph))
        raise compat.StopTracing

    call = torch.compile(compat.fresh(lambda ids: model(input_ids=ids, use_cache=False)), backend=look, fullgraph=True)
    try:
        with torch.no_grad():
            call(torch.arange(3, 15)[None])
    except Exception as error:
        if not compat.is_stop(error):
            raise
    return found[0]


@pytest.mark.parametrize("family", EXPECTED)
def test_roles(family: str) -> None:
    found = graph_of(tiny(family))
    counts: dict[str, int] = {}
    for role in found.of.values():
        counts[role] = counts.get(role, 0) + 1
    assert counts == EXPECTED[family]
    assert [g.half for g in found.gated] == {"phi3": [1, 1], "phi": []}.get(family, [None, None])
    for module, role in found.of.items():  # names agree where a family has them
        if role in ("q", "k", "v", "gate", "up", "down") and family != "phi":
            assert module.endswith(f".{role}_proj")


@pytest.mark.parametrize("recipe", ["w4", "w4a8"])
def test_packed_linears_have_the_same_roles(recipe: str) -> None:
    model = tiny("llama")
    want = graph_of(model).of
    compress(model, recipe)
    got = graph_of(model)
    assert got.of == want and len(got.gated) == 2
