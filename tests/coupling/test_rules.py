"""Operator by operator: what is not pinned may be permuted, and what depends on order is pinned."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effllm.coupling import CoupledGraph, permute
from tests.coupling.helpers import moving


class Net(nn.Module):
    """Parameters a (6, 8), b (6, 8), c (8,), k (12, 8, 3), and a function of them."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        for name, shape in {"a": (6, 8), "b": (6, 8), "c": (8,), "k": (12, 8, 3), "s": (8, 8)}.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, dtype=torch.float64)))
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def sums(y):
    """A scalar that depends on every element's neighbourhood in no way."""
    return (y * y).sum()


FREE = {
    # name: (function, free sizes, pinned sizes)
    "linear": (lambda m, x: sums(F.linear(x @ m.s, m.a)), {6, 8}, {8}),
    "tanh of a sum": (lambda m, x: sums(torch.tanh(m.a + m.b + m.c)), {6, 8}, set()),
    "softmax": (lambda m, x: sums((m.a * m.b).softmax(-1)), {6, 8}, set()),
    "softmax over all but one": (lambda m, x: sums(m.k.softmax(1)), {12, 8, 3}, set()),
    "layer norm": (lambda m, x: sums(F.layer_norm(m.a, (8,), m.c, m.c)), {6, 8}, set()),
    "rms norm": (lambda m, x: sums(F.rms_norm(m.a, (8,), m.c)), {6, 8}, set()),
    "mean and variance": (lambda m, x: m.a.mean(0).var() + m.b.amax(1).sum() + m.a.logsumexp(1).sum(), {6, 8}, set()),
    "cumsum": (lambda m, x: sums(m.a.cumsum(1)), {6}, {8}),
    "topk": (lambda m, x: m.a.topk(2, 1).values.sum(), {6}, {8}),
    "argmax": (lambda m, x: m.a.argmax(1).sum(), {6}, {8}),
    "flip": (lambda m, x: sums(m.a.flip(1) + m.b), set(), {6, 8}),
    "roll": (lambda m, x: sums(m.a.roll(1, 1) + m.b), set(), {6, 8}),
    "unknown": (lambda m, x: torch.linalg.det(m.s), set(), {8}),
    "arange": (lambda m, x: sums(m.c * torch.arange(8)), set(), {8}),
    "where": (lambda m, x: sums(torch.where(m.a > 0, m.a, m.b)), {6, 8}, set()),
    "row by number": (lambda m, x: sums(m.a[torch.tensor([0, 2])] * m.c), {8}, {6}),
    "slice": (lambda m, x: sums(m.a[:, 2:5]) + m.a[:, 1].sum(), {6, 3}, {3}),
    "every other": (lambda m, x: sums(torch.stack((m.a[:, ::2], -m.a[:, 1::2]), -1).flatten(1) * m.c), {6, 4}, set()),
    "halves swapped": (lambda m, x: sums(torch.cat((-m.a[:, 4:], m.a[:, :4]), 1) * m.b * m.c), {6, 4}, set()),
    "chunk and gate": (lambda m, x: sums(torch.mul(*m.a.chunk(2, 1))), {6, 4}, set()),
    "split unevenly": (lambda m, x: sum(sums(p) for p in m.a.split([1, 3, 4], 1)), {6, 3, 4}, set()),
    "unbind": (lambda m, x: sums(m.a.unbind(0)[1] + m.c), {8}, set()),
    "view and transpose": (lambda m, x: sums(m.a.view(6, 2, 4).transpose(0, 1) * m.c.view(2, 1, 4)), {6, 2, 4}, set()),
    "movedim and permute": (lambda m, x: sums(m.k.movedim(0, -1) + m.k.permute(1, 2, 0)), {12, 8, 3}, set()),
    "view across": (lambda m, x: sums(m.a.view(16, 3)) + sums(m.a.view(16, 3)[:, 0] * torch.arange(16)), set(), {6, 8}),
    "transposed onto itself": (lambda m, x: sums(m.s + m.s.t()), {8}, set()),
    "repeat": (lambda m, x: sums(m.c.repeat(3) * m.c.repeat_interleave(3).view(8, 3).t().reshape(24)), {8}, set()),
    "expand": (lambda m, x: sums(m.c.expand(6, 8) * m.a), {6, 8}, set()),
    "pad": (lambda m, x: sums(F.pad(m.a, (2, 1))), {6, 8}, set()),
    "einsum": (lambda m, x: sums(torch.einsum("ij,kj,j->ik", m.a, m.b, m.c)), {6, 8}, set()),
    "batched product": (lambda m, x: sums(m.k.transpose(1, 2) @ m.k), {12, 8, 3}, set()),
    "conv": (lambda m, x: sums(F.conv1d(m.a.t()[None], m.k)), {8, 12}, {6, 3}),
    "depthwise conv": (lambda m, x: sums(F.conv1d(m.s[None], m.s[:, None, :3].contiguous(), m.c, groups=8)), {8}, {3, 5}),
    "in place": (lambda m, x: sums((m.a * 1).add_(m.c).mul_(m.b)), {6, 8}, set()),
    "attention": (lambda m, x: sums(F.scaled_dot_product_attention(m.a[None], m.b[None], m.b[None] * m.c)), {6, 8}, set()),
    "output": (lambda m, x: m.a * m.c, set(), {6, 8}),
    "input": (lambda m, x: sums(x @ m.s), {8}, {8}),
}


@pytest.mark.parametrize("name", FREE)
def test_what_is_free_may_be_permuted(name):
    function, free, pinned = FREE[name]
    model, x = Net(function), torch.randn(5, 8, dtype=torch.float64)
    graph = CoupledGraph.of(model, (x,))
    assert {d.size for d in graph.dimensions if not d.pinned} == free
    assert {d.size for d in graph.dimensions if d.pinned} >= pinned
    assert all(d.pinned[0] for d in graph.dimensions if d.pinned)
    with torch.no_grad():
        before = model(x)
        for d in graph.dimensions:
            if not d.pinned:
                permute(model, d, moving(d, torch.Generator().manual_seed(2)))
                torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


def test_permuting_differently_along_a_summed_axis_is_not_allowed():
    # heads (2) of a (6, 2, 4) view: a softmax over the 4 mixes them within a head, so heads move as a whole
    model = Net(lambda m, x: sums(m.a.view(6, 2, 4).softmax(-1) * m.c.view(2, 4)))
    dims = CoupledGraph.of(model, (torch.zeros(1),)).of_parameter("c", 0)
    heads, inner = sorted(dims, key=lambda d: d.size)
    assert (heads.size, heads.structure.blocks, heads.structure.unit) == (2, (), 4)
    assert (inner.size, inner.structure.blocks) == (4, (2,))


def test_a_norm_shared_by_heads_makes_their_order_one():
    shared = Net(lambda m, x: sums(F.rms_norm(m.a.view(6, 2, 4), (4,), m.c[:4])))
    own = Net(lambda m, x: sums(F.rms_norm(m.a.view(6, 2, 4), (4,)) * m.c.view(2, 4)))
    x = torch.zeros(1)
    (inner,) = (d for d in CoupledGraph.of(shared, (x,)).of_parameter("a", 1) if d.size == 4)
    assert inner.structure.blocks == ()
    (inner,) = (d for d in CoupledGraph.of(own, (x,)).of_parameter("a", 1) if d.size == 4)
    assert inner.structure.blocks == (2,)


def test_grouped_attention_shares_an_order_per_key_head():
    def attend(m, x):
        q, k = F.linear(x, m.k.reshape(36, 8)[:32]).view(1, 5, 4, 8).transpose(1, 2), F.linear(x, m.k.reshape(36, 8)[:16]).view(1, 5, 2, 8).transpose(1, 2)
        return sums(F.scaled_dot_product_attention(q, k, k, enable_gqa=True))

    graph = CoupledGraph.of(Net(attend), (torch.randn(1, 5, 8, dtype=torch.float64),))
    assert not [d for d in graph.dimensions if any("scaled_dot" in r for r in d.pinned)]
