"""Sixteen families: which dimensions there are, that permuting any of them leaves the logits alone, and that leaving out a member does not."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import networkx as nx
import pytest
import torch

from effllm.coupling import CoupledGraph, inverse, permute
from effllm.errors import CouplingError
from tests.coupling.golden import GOLDEN
from tests.coupling.helpers import MOE, build, difference, logits, moving, table

# fp64 rounding through two layers, and fp32 where a grouped product knows no fp64
EXACT, SINGLE = 1e-10, 1e-5
# a bias of keys that are not rotated adds the same to all scores of a query, which a softmax does not see: where such biases sit
UNSEEN = (("transformer.h.0.attn.c_attn.bias", 72), ("gpt_neox.layers.0.attention.query_key_value.bias", 20))


@cache
def subject(family: str) -> tuple[Any, dict[str, Any], CoupledGraph]:
    model, inputs = build(family)
    return model, inputs, CoupledGraph.of(model, inputs, output="logits")


@pytest.mark.parametrize("family", GOLDEN)
def test_the_dimensions_are_the_known_ones(family):
    _, _, graph = subject(family)
    assert table(graph) == GOLDEN[family]
    assert all(nx.is_connected(graph.networkx.subgraph(c)) for c in nx.connected_components(graph.networkx))


@pytest.mark.parametrize("family", GOLDEN)
def test_any_free_dimension_may_be_permuted(family):
    model, inputs, graph = subject(family)
    before, generator = logits(model, inputs), torch.Generator().manual_seed(1)
    tolerance = SINGLE if family in MOE else EXACT
    free = [d for d in graph.dimensions if not d.pinned]
    assert free
    for d in free:
        p = moving(d, generator)
        permute(model, d, p, volatile=True)
        error = difference(logits(model, inputs), before)
        permute(model, d, inverse(p), volatile=True)
        assert error < tolerance, f"dimension {d.index}: {error}"


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt2", "gpt_neox", "t5"])
def test_leaving_out_any_member_shows(family):
    model, inputs, graph = subject(family)
    before, generator = logits(model, inputs), torch.Generator().manual_seed(1)
    for d in graph.dimensions:
        if d.pinned or all(".1." in m.parameter for m in d.members):  # the second layer is the first one again
            continue
        for left_out in d.members:
            if (left_out.parameter, left_out.offset) in UNSEEN or len(d.members) == 1:
                continue
            partial = dataclasses.replace(d, members=tuple(m for m in d.members if m is not left_out))
            p = moving(d, generator)
            permute(model, partial, p, volatile=True)
            error = difference(logits(model, inputs), before)
            permute(model, partial, inverse(p), volatile=True)
            assert error > 1e-7, f"dimension {d.index} without {left_out}: {error}"
    assert difference(logits(model, inputs), before) == 0


def test_all_dimensions_at_once():
    model, inputs, graph = subject("llama")
    before, generator = logits(model, inputs), torch.Generator().manual_seed(2)
    done = [(d, moving(d, generator)) for d in graph.dimensions if not d.pinned]
    for d, p in done:
        permute(model, d, p, volatile=True)
    assert difference(logits(model, inputs), before) < EXACT
    for d, p in reversed(done):
        permute(model, d, inverse(p), volatile=True)
    assert difference(logits(model, inputs), before) == 0


def test_a_cache_in_the_output_is_left_out_by_name():
    model, inputs = build("llama")
    with pytest.raises(CouplingError, match="DynamicCache") as caught:
        CoupledGraph.of(model, inputs | {"use_cache": True})
    assert caught.value.code == "E-CPL-CAPTURE" and "output=" in caught.value.next_step
    assert table(CoupledGraph.of(model, inputs | {"use_cache": True}, output="logits")) == GOLDEN["llama"]


def test_rotary_frequencies_are_named_as_what_no_checkpoint_holds():
    _, _, graph = subject("gemma3")
    rotary = [d for d in graph.dimensions if d.structure.rotary]
    assert len(rotary) == 2  # sliding and full attention have frequencies of their own
    assert all(len(d.volatile) == 1 and "inv_freq" in d.volatile[0] for d in rotary)
    assert not any(d.volatile for d in graph.dimensions if not d.structure.rotary)
