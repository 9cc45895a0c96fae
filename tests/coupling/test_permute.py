"""Permuting in place: all members or none, and an error that says why."""

from __future__ import annotations

import copy
import dataclasses
import re

import pytest
import torch
from torch import nn

from effllm.coupling import CoupledGraph, channel_energy, channel_order, inverse, nm_order, permute
from effllm.errors import CouplingError
from tests.coupling.helpers import moving


class Mlp(nn.Module):
    """A gated MLP with biases behind a norm, its input an embedding that the head is tied to."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 32)
        self.down = nn.Linear(16, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.emb.weight
        self.register_buffer("scale", torch.rand(16), persistent=False)
        self.double()

    def forward(self, ids):
        x = self.emb(ids)
        gate, up = self.up(self.norm(x)).chunk(2, -1)
        return self.head(x + self.down(torch.relu(gate) * up))


class Scaled(Mlp):
    """The same with a buffer that no checkpoint holds."""

    def forward(self, ids):
        gate, up = self.up(self.norm(self.emb(ids))).chunk(2, -1)
        return self.head(self.down(torch.relu(gate) * up * self.scale))


IDS = torch.tensor([[1, 2, 3, 4, 10]])


def captured(cls=Mlp):
    model = cls().eval()
    return model, CoupledGraph.of(model, (IDS,))


def inner_of(graph):
    (dimension,) = graph.of_parameter("down.weight", 1)
    return dimension


def code_of(call):
    with pytest.raises(CouplingError) as caught:
        call()
    assert caught.value.cause and caught.value.next_step
    return caught.value.code


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def test_the_graph_of_a_gated_mlp():
    _, graph = captured()
    dimension = inner_of(graph)
    where = [(m.parameter, m.axis, m.offset, m.summed) for m in dimension.members]
    assert where == [("down.weight", 1, 0, True), ("up.bias", 0, 0, False), ("up.bias", 0, 16, False), ("up.weight", 0, 0, False), ("up.weight", 0, 16, False)]
    assert str(dimension.structure) == "free" and dimension.structure.occurrences == 2
    assert [m.parameter for m in dimension.consumers] == ["down.weight"]
    (width,) = graph.of_parameter("head.weight", 1)
    assert width is graph.of_parameter("emb.weight", -1)[0] and not width.pinned
    assert "head.weight" in width.names["emb.weight"]
    assert graph.of_parameter("emb.weight", 0)[0].pinned
    why = graph.why(("up.weight", 0), ("down.weight", 1))
    assert any(w.startswith("chunk") for w in why) and why[-1].startswith("linear")
    assert graph.why(("up.weight", 0), ("up.weight", 1)) == []
    assert all({"op"} == set(data) for *_, data in graph.networkx.edges(data=True))
    table = graph.explain()
    assert len(table.splitlines()) == 1 + len(graph.dimensions) and "picks rows by number" in table


def test_members_move_as_documented_and_back():
    model, graph = captured()
    before, dimension = state(model), inner_of(graph)
    p = moving(dimension, torch.Generator().manual_seed(0))
    permute(model, dimension, p)
    assert torch.equal(model.down.weight, before["down.weight"][:, p])
    assert torch.equal(model.up.weight, before["up.weight"].view(2, 16, 8)[:, p].reshape(32, 8))
    assert torch.equal(model.up.bias, before["up.bias"].view(2, 16)[:, p].reshape(32))
    permute(model, dimension, inverse(p))
    assert same(state(model), before)


def test_two_permutations_compose():
    model, graph = captured()
    other, dimension = copy.deepcopy(model), inner_of(graph)
    p, q = torch.randperm(16), torch.randperm(16)
    permute(model, dimension, p)
    permute(model, dimension, q)
    permute(other, dimension, p[q])
    assert same(state(model), state(other))


def test_tied_weights_move_once_and_versions_rise():
    model, graph = captured()
    (width,) = graph.of_parameter("head.weight", 1)
    weight, version, before = model.emb.weight, model.emb.weight._version, model(IDS)
    permute(model, width, torch.arange(8).roll(1))
    assert model.emb.weight is weight is model.head.weight and weight._version > version
    torch.testing.assert_close(model(IDS), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("permutation", "code"),
    [
        (torch.arange(15), "E-CPL-SIZE"),
        (torch.arange(32), "E-CPL-SIZE"),
        (torch.arange(16).reshape(2, 8), "E-CPL-SIZE"),
        (torch.tensor([*range(15), 0]), "E-CPL-PERMUTATION"),
        (torch.arange(1, 17), "E-CPL-PERMUTATION"),
        (torch.arange(16) - 1, "E-CPL-PERMUTATION"),
        (torch.arange(16).float(), "E-CPL-PERMUTATION"),
    ],
)
def test_a_wrong_permutation_writes_nothing(permutation, code):
    model, graph = captured()
    before = state(model)
    assert code_of(lambda: permute(model, inner_of(graph), permutation)) == code
    assert same(state(model), before)


def test_a_pinned_dimension_says_why():
    model, graph = captured()
    (rows,) = graph.of_parameter("emb.weight", 0)
    with pytest.raises(CouplingError, match=r"embedding \(embedding\) picks rows by number") as caught:
        permute(model, rows, torch.arange(11))
    assert caught.value.code == "E-CPL-PINNED"


def test_buffers_outside_of_checkpoints_want_consent():
    model, graph = captured(Scaled)
    dimension, before = inner_of(graph), model(IDS)
    assert dimension.volatile == ("scale",)
    p = torch.arange(16).roll(3)
    assert code_of(lambda: permute(model, dimension, p)) == "E-CPL-VOLATILE"
    permute(model, dimension, p, volatile=True)
    torch.testing.assert_close(model(IDS), before, rtol=1e-12, atol=1e-12)


def _untie(m):
    m.head.weight = nn.Parameter(m.head.weight.detach().clone())


def _tie_more(m):
    m.extra = nn.Linear(16, 8)
    m.extra.weight = m.down.weight


def _view(m):
    m.extra = nn.Parameter(m.down.weight.detach()[:2])


def _expanded(m):
    m.up.bias = nn.Parameter(torch.zeros(1, dtype=torch.float64).expand(32))


def _smaller(m):
    m.down = nn.Linear(12, 8)


def _gone(m):
    m.up = nn.Identity()


def _meta(m):
    m.down.to("meta")


def _sparse(m):
    m.down.weight = nn.Parameter(m.down.weight.detach().to_sparse())


@pytest.mark.parametrize(
    ("change", "axis", "code"),
    [
        (_untie, ("emb.weight", 1), "E-CPL-TIED"),
        (_tie_more, ("down.weight", 1), "E-CPL-TIED"),
        (_view, ("down.weight", 1), "E-CPL-ALIAS"),
        (_expanded, ("down.weight", 1), "E-CPL-ALIAS"),
        (_smaller, ("down.weight", 1), "E-CPL-MODEL"),
        (_gone, ("down.weight", 1), "E-CPL-MODEL"),
        (_meta, ("down.weight", 1), "E-CPL-META"),
        (_sparse, ("down.weight", 1), "E-CPL-LAYOUT"),
    ],
)
def test_another_model_than_the_captured_one(change, axis, code):
    model, graph = captured()
    (dimension,) = graph.of_parameter(*axis)
    change(model)
    before = model.up.weight.detach().clone() if isinstance(model.up, nn.Linear) else None
    assert code_of(lambda: permute(model, dimension, torch.arange(dimension.size).roll(1))) == code
    assert before is None or torch.equal(model.up.weight, before)


def test_tensors_of_inference_mode():
    with torch.inference_mode():
        frozen = Mlp().eval()
    _, graph = captured()
    dimension = inner_of(graph)
    assert code_of(lambda: permute(frozen, dimension, torch.arange(16).roll(1))) == "E-CPL-INFERENCE"
    with torch.inference_mode():
        before = frozen(IDS)
        permute(frozen, dimension, torch.arange(16).roll(1))
        torch.testing.assert_close(frozen(IDS), before, rtol=1e-12, atol=1e-12)


def test_an_interrupt_leaves_nothing_half_done(monkeypatch):
    from effllm.coupling import permute as package_name  # the function; the module has the same name
    from effllm.coupling.permute import _reorder as real

    model, graph = captured()
    before, calls = state(model), []

    def failing(tensor, axis, order):
        calls.append(axis)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(tensor, axis, order)

    monkeypatch.setitem(package_name.__globals__, "_reorder", failing)
    with pytest.raises(KeyboardInterrupt):
        permute(model, inner_of(graph), torch.arange(16).roll(1))
    assert len(calls) == 5 and same(state(model), before)


def test_what_cannot_be_traced_or_found():
    class Branch(nn.Module):
        def forward(self, x):
            return x if bool(x.sum() > 0) else -x

    assert code_of(lambda: CoupledGraph.of(Branch(), (torch.ones(3),))) == "E-CPL-CAPTURE"
    _, graph = captured()
    assert code_of(lambda: graph.of_parameter("down.wieght", 0)) == "E-CPL-PARAMETER"
    assert code_of(lambda: graph.of_parameter("down.weight", 2)) == "E-CPL-PARAMETER"
    with pytest.raises(CouplingError, match=re.escape("'down.weight'")):
        graph.of_parameter("down.wieght", 0)


def test_shared_modules_are_one_member():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(8, 8, bias=False).double()
            self.two = self.one
            self.up, self.down = nn.Linear(8, 12).double(), nn.Linear(12, 8).double()

        def forward(self, x):
            x = self.one(x)
            return (self.two(self.down(self.up(self.one(x)))) ** 2).sum()

    model, x = Twice(), torch.randn(3, 8, dtype=torch.float64)
    graph = CoupledGraph.of(model, (x,))
    (square,) = graph.of_parameter("two.weight", 0)
    assert square.pinned and "input" in square.pinned[0]  # its input is its own output, and once the model's input
    (inner,) = graph.of_parameter("up.weight", 0)
    before = model(x)
    permute(model, inner, torch.arange(12).roll(5))
    torch.testing.assert_close(model(x), before)


def test_channels_sorted_by_energy():
    model, graph = captured()
    dimension, before = inner_of(graph), model(IDS)
    energy = channel_energy(dimension, {"up.weight": model.up.weight})
    torch.testing.assert_close(energy, model.up.weight.detach().square().view(2, 16, 8).sum((0, 2)))
    order = channel_order(dimension, energy)
    permute(model, dimension, order)
    again = channel_energy(dimension, {"up.weight": model.up.weight})
    assert torch.equal(again.sort(descending=True).values, again)
    torch.testing.assert_close(model(IDS), before, rtol=1e-12, atol=1e-12)
    assert torch.equal(channel_order(dimension, energy, descending=False), order.flip(0))
    assert code_of(lambda: channel_order(dimension, energy[:3])) == "E-CPL-SCORE"
    assert code_of(lambda: channel_order(dimension, energy * float("nan"))) == "E-CPL-SCORE"


def test_an_order_for_a_mask():
    model, graph = captured()
    dimension = inner_of(graph)
    with torch.no_grad():
        model.down.weight[:, 8:] *= 0.01
    found = nm_order(dimension, {"down.weight": model.down.weight.abs()}, 2, 4)
    kept = model.down.weight.detach().abs().view(8, 4, 4).topk(2, -1).values.sum()
    assert found.before == pytest.approx(float(kept / model.down.weight.detach().abs().sum()))
    permute(model, dimension, found.permutation)
    kept = model.down.weight.detach().abs().view(8, 4, 4).topk(2, -1).values.sum()
    assert found.after == pytest.approx(float(kept / model.down.weight.detach().abs().sum()))
    assert found.after > 0.98 > found.before
    by_axis = nm_order(dimension, {("down.weight", 1): model.down.weight.abs()}, 2, 4)
    assert by_axis.before == pytest.approx(found.after)
    assert code_of(lambda: nm_order(dimension, {"up.weight": model.up.weight.abs()}, 2, 4)) == "E-CPL-SCORE"
    assert code_of(lambda: nm_order(dimension, {"down.weight": model.down.weight[:, :8].abs()}, 2, 4)) == "E-CPL-SCORE"
    assert code_of(lambda: nm_order(dimension, {"down.weight": model.down.weight.abs()}, 2, 5)) == "E-CPL-PATTERN"


def test_groups_that_no_permutation_refills():
    _, graph = captured()
    dimension = inner_of(graph)
    strided = dataclasses.replace(dimension, members=tuple(dataclasses.replace(m, stride=2) for m in dimension.members if m.summed))
    assert code_of(lambda: nm_order(strided, {"down.weight": torch.ones(8, 16)}, 2, 4)) == "E-CPL-PATTERN"
