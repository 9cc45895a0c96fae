"""Losses, optimizer, data order, rank pruning and adapters, each against its formula."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import effllm
from effllm.errors import OptionError, RecoveryError, WeightError
from effllm.recovery import ordered, truncation
from effllm.recovery.adapters import AdaptedLinear, Adapter, install, remove
from effllm.recovery.data import Data, data, targets_of
from effllm.recovery.forward import Body, block_names
from effllm.recovery.grebsmo import grebsmo, support
from effllm.recovery.loss import Weights, divergence, head_gradient, next_tokens, squarehead
from effllm.recovery.optimizer import Masters, rate
from effllm.recovery.ordered import Ordered
from effllm.recovery.select import pairs, selected
from effllm.recovery.truncation import Truncation
from tests.recovery.models import Small, dense, low_rank, same, state, windows

FAST = {"batch": 4, "precision": "fp32", "lr": 0.02}


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- losses


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_chunked_loss_equals_the_loss_in_one_piece(temperature):
    rows, width, vocabulary = 300, 7, 11  # more than two chunks, the last one short
    hidden, w, wt = (rand(*s, seed=i, dtype=torch.float32) for i, s in enumerate(((rows, width), (vocabulary, width), (vocabulary, width))))
    head = nn.Linear(width, vocabulary, bias=False)
    head.weight = nn.Parameter(w.clone())
    targets = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(rows) % 5 > 0).float()
    targets[mask == 0] = -100
    weights = Weights(kl=0.7, lm=0.3, temperature=temperature)
    gradient, losses = head_gradient(hidden, head, lambda at: hidden[at] @ wt.t(), targets, mask, weights)
    x, v = hidden.double().requires_grad_(), w.double().requires_grad_()
    p, q = torch.log_softmax(x.detach() @ wt.double().t() / temperature, -1), torch.log_softmax(x @ v.t() / temperature, -1)
    kl = (((p.exp() * (p - q)).sum(-1) * mask).sum() / mask.sum()) * temperature**2
    lm = F.cross_entropy(x @ v.t(), targets)
    (0.7 * kl + 0.3 * lm).backward()
    assert losses.kl == pytest.approx(float(kl), rel=1e-5) and losses.lm == pytest.approx(float(lm), rel=1e-5)
    assert losses.total == pytest.approx(0.7 * losses.kl + 0.3 * losses.lm)
    torch.testing.assert_close(gradient.double(), x.grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(head.weight.grad.double(), v.grad, rtol=1e-4, atol=1e-6)
    assert (gradient[mask == 0] == 0).all()


def test_squarehead_is_zero_for_equal_one_for_zero_and_blind_to_padding():
    t = rand(2, 5, 4)
    mask = torch.ones(10)
    assert squarehead(t, t, mask) == 0
    assert float(squarehead(torch.zeros_like(t), t, mask)) == pytest.approx(1)
    # the scale of a token does not matter
    scaled = t * torch.arange(1, 11).view(2, 5, 1) ** 3
    assert float(squarehead(scaled * 0.9, scaled, mask)) == pytest.approx(0.01)
    spoiled = t.clone()
    spoiled[0, 0] = 1e6
    mask[0] = 0
    assert squarehead(spoiled, t, mask) == 0


def test_divergence_is_zero_at_the_teacher_and_positive_elsewhere():
    a, b = rand(6, 9), rand(6, 9, seed=1)
    assert float(divergence(a, a, torch.ones(6))) == pytest.approx(0, abs=1e-12)
    assert float(divergence(a, b, torch.ones(6))) > 0


def test_targets_leave_padding_out():
    ids = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]])
    assert next_tokens(ids, None).tolist() == [[2, 3, 0, -100], [5, 6, 7, -100]]
    following, mask = targets_of({"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])}, 8)
    assert following.tolist() == [2, 3, -100, -100, 5, 6, 7, -100] and mask.tolist() == [1, 1, 1, 0, 1, 1, 1, 1]
    both = {"input_features": torch.zeros(2, 3), "decoder_input_ids": ids, "labels": ids + 1}
    assert targets_of(both, 8)[0].tolist() == (ids + 1).flatten().tolist()
    assert (targets_of({"pixels": torch.zeros(3, 2)}, 6)[0] == -100).all()


# --- data, forward, selection


def test_each_epoch_is_a_permutation_and_depends_on_the_seed():
    items = data(windows(10), 3, 1)
    seen = [i for position in range(10) for i in items.micro(position, 0)]  # three epochs
    assert all(sorted(seen[e : e + 10]) == list(range(10)) for e in (0, 10, 20))
    assert seen[:10] != seen[10:20] and seen[:10] != [i for p in range(4) for i in items.micro(p, 1)][:10]
    assert items.join([0, 2]).shape == (2, 12)
    assert items.fingerprint() == data(windows(10), 1, 1).fingerprint() != data(windows(10, seed=4), 3, 1).fingerprint()


def test_body_stops_at_the_head():
    model, ids = dense(), windows(2)
    body = Body(model, ids, ("layers.1",))
    hidden, features = body(ids)
    assert body.head is model.head and hidden.shape == (2, 12, 24) and features[0].shape == (2, 12, 24)
    assert torch.equal(body.logits(hidden), model(ids))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    capped = dense(cap=True)
    body = Body(capped, ids)
    assert body.head is None and torch.equal(body(ids)[0], capped(ids))
    assert block_names(model, None) == ("layers.0", "layers.1", "layers.2")
    assert block_names(model, 1) == ("layers.2",) and block_names(Small(blocks=6), 2) == ("layers.2", "layers.5") and block_names(model, 0) == ()


def test_selection():
    model = low_rank(dense())
    chosen = selected(model, "factors")
    assert set(chosen.parameters) == {f"layers.{i}.up.{p}" for i in range(3) for p in "ab"}
    assert 0 < chosen.share < 1 and "3 x layers.*.up.a" in str(chosen)
    assert set(selected(model, ["*.bias", "norm.*"]).parameters) == {n for n, _ in model.named_parameters() if n.endswith(".bias") or n.startswith("norm.")}
    assert selected(model, "all").share == 1
    assert all("norm" in n or "bias" in n for n in selected(model, "perp").parameters)
    model.layers[2].up = model.layers[1].up  # shared: trained once
    assert len(selected(model, "factors").parameters) == 4 and len(pairs(model)) == 2
    with pytest.raises(RecoveryError, match="E-REC-NOTHING"):
        selected(dense(), "factors")


# --- optimizer


def test_schedule():
    values = [rate(i, 100, 10) for i in range(100)]
    assert values[:10] == [(i + 1) / 11 for i in range(10)] and values[10] == 1
    assert all(a > b for a, b in itertools.pairwise(values[10:])) and 0 < values[-1] < 0.01


@pytest.mark.parametrize("power", [-12, 0, 9])
def test_steps_do_not_depend_on_how_the_factors_share_their_size(power):
    def run(c):
        p = nn.Parameter(rand(4, 5, dtype=torch.float32) * c)
        masters = Masters({"p": p}, clip=0.5, decay=0.1)
        for i in range(5):
            p.grad = rand(4, 5, seed=i, dtype=torch.float32) / c  # the gradient of f(p / c)
            masters.collect()
            masters.step(0.01, masters.norm())
        return p.detach() / c

    assert torch.equal(run(2.0**power), run(1.0))


@pytest.mark.parametrize("column_major", [False, True])
def test_a_step_is_adamw(column_major):
    start, g = rand(4, 5, dtype=torch.float32), rand(4, 5, seed=1, dtype=torch.float32)
    p = nn.Parameter(start.t().contiguous().t() if column_major else start.clone())
    masters = Masters({"p": p}, clip=None)
    want = nn.Parameter(start.clone())
    adam = torch.optim.AdamW([want], lr=0.01 * masters.scales["p"], betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0, foreach=False)
    for i in range(3):
        p.grad, want.grad = g * (i + 1), g * (i + 1)
        masters.collect()
        masters.add_gradient("p", (g.t().contiguous() * i).t())
        want.grad += g * i
        masters.step(0.01, masters.norm())
        adam.step()
    torch.testing.assert_close(p, want, rtol=1e-6, atol=1e-7)


def test_masters_keep_what_bf16_loses():
    p = nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    masters = Masters({"p": p}, clip=None)
    for _ in range(20):
        p.grad = torch.ones_like(p)
        masters.collect()
        masters.step(1e-4, masters.norm())  # far below bf16's step of 2^-8 below one
    assert float(masters.value("p")[0, 0]) == pytest.approx(1 - 20e-4, abs=1e-5)
    assert float(p[0, 0]) == pytest.approx(1 - 20e-4, abs=2**-8)


def test_clipping_and_accumulation():
    p = nn.Parameter(torch.ones(3))
    masters = Masters({"p": p}, clip=1.0)
    for _ in range(2):
        p.grad = torch.full((3,), 4.0)
        masters.collect(0.5)
    assert masters.norm() == pytest.approx(4 * math.sqrt(3))
    masters.x["p"].grad[1] = math.inf
    assert masters.norm() == math.inf


# --- TRP and Maestro


def test_truncation_keeps_the_energy_and_not_a_rank_more():
    a, b = rand(12, 8), rand(8, 15, seed=1)
    w = a @ b
    for energy in (0.5, 0.9, 1.0):
        left, right, rank = truncation.truncate(a, b, energy)
        kept = (left @ right).square().sum() / w.square().sum()
        assert torch.linalg.matrix_rank(left @ right) == rank and kept >= energy - 1e-9
        sigma = torch.linalg.svdvals(w)
        assert rank == 1 or (sigma[: rank - 1].square().sum() / sigma.square().sum()) < energy
        assert (left[:, rank:] == 0).all() and (right[rank:] == 0).all() and left.shape == a.shape
        same_w, same_rank = truncation.truncate_dense(w, energy)
        assert same_rank == rank
        torch.testing.assert_close(same_w, left @ right, rtol=1e-9, atol=1e-9)
    assert truncation.rank_of(torch.zeros(3), 0.9) == 1


@pytest.mark.parametrize("shape", [(12, 5, 9), (4, 4, 9), (5, 7, 6)])
def test_nuclear_gradient_is_the_directional_derivative(shape):
    n, r, k = shape
    a, b, da, db = rand(n, r), rand(r, k, seed=1), rand(n, r, seed=2), rand(r, k, seed=3)
    if r > min(n, k):
        a, b = a[:, : min(n, k)], b[: min(n, k)]  # beyond full rank the sum of singular values is smooth all the same
        da, db = da[:, : min(n, k)], db[: min(n, k)]
    ga, gb = truncation.nuclear_gradient(a, b)
    h = 1e-6

    def norm(t):
        return torch.linalg.svdvals((a + t * da) @ (b + t * db)).sum()

    numeric = (norm(h) - norm(-h)) / (2 * h)
    assert float((ga * da).sum() + (gb * db).sum()) == pytest.approx(float(numeric), rel=1e-6)
    w = a @ b
    torch.testing.assert_close(truncation.nuclear_gradient_dense(w) @ b.t(), ga, rtol=1e-6, atol=1e-8)


def test_lasso_gradient_is_autograds():
    x = rand(6, 5).requires_grad_()
    sum(x[:, k:].norm() for k in range(5)).backward()
    torch.testing.assert_close(ordered.lasso_gradient(x.detach()), x.grad)
    zero = torch.zeros(3, 4, dtype=torch.float64)
    zero[:, 0] = 1
    assert torch.isfinite(ordered.lasso_gradient(zero)).all()


def test_dropped_ranks_get_no_gradient_and_come_back():
    model, ids = low_rank(dense()), windows(2)
    found, before = pairs(model), state(model)
    for pair in found:
        pair.a.requires_grad_(True)
        pair.b.requires_grad_(True)
    with ordered.dropped(found, Ordered(layers=3), torch.Generator().manual_seed(1)) as chosen:
        model(ids).square().sum().backward()
        assert sorted(n for n, _ in chosen) == [p.name for p in found] and min(k for _, k in chosen) < 5
        for name, k in chosen:
            pair = next(p for p in found if p.name == name)
            assert (pair.a.grad[:, k:] == 0).all() and (pair.b.grad[k:] == 0).all()
            assert (pair.a.grad[:, :k] != 0).any()
    assert same(state(model), before)


def test_ordered_dropout_finds_the_singular_directions():
    # linear regression on white inputs: the learnt columns are the target's left singular vectors, in order (Maestro, theorem 4.1)
    q1, q2 = torch.linalg.qr(rand(6, 6))[0], torch.linalg.qr(rand(6, 6, seed=1))[0]
    w = (q1 * torch.tensor([3.0, 1.5, 0.7, 0.0, 0.0, 0.0], dtype=torch.float64)) @ q2.t()
    a, b = (0.3 * rand(6, 4, seed=2)).requires_grad_(), (0.3 * rand(4, 6, seed=3)).requires_grad_()
    adam = torch.optim.Adam([a, b], lr=0.02)
    for _ in range(2500):
        adam.zero_grad()
        # the expectation over k, in place of a sample
        sum((a[:, :k] @ b[:k] - w).square().sum() for k in range(1, 5)).backward()
        adam.step()
    for i in range(3):
        assert abs(float(F.cosine_similarity(a[:, i].detach(), q1[:, i], dim=0))) > 0.99
    assert ordered.rank_left(a.detach(), b.detach(), 0.01) == 3


def test_truncation_and_ordered_dropout_prune_a_model():
    teacher = dense()
    model = low_rank(teacher, 20)
    report = effllm.recover(model, teacher, windows(), 6, truncation=Truncation(period=3, energy=0.8), **FAST)
    for pair in pairs(model):
        assert 1 <= report.ranks[pair.name] == pair.a.shape[1] < 20
    model = low_rank(teacher, 20)
    with torch.no_grad():
        model.layers[0].up.a[:, 9:] *= 1e-9
    report = effllm.recover(model, teacher, windows(), 3, ordered=Ordered(), **FAST | {"lr": 1e-6})
    assert report.ranks["layers.0.up"] == 9 and model.layers[0].up.a.shape[1] == 9
    whole = copy.deepcopy(teacher)
    report = effllm.recover(whole, teacher, windows(), 4, what="all", truncation=Truncation(period=2, energy=0.8), **FAST)
    assert torch.linalg.matrix_rank(whole.layers[0].up.weight.detach().double(), rtol=1e-5) == report.ranks["layers.0.up.weight"] < 24
    with pytest.raises(RecoveryError, match="E-REC-PAIR"):
        effllm.recover(copy.deepcopy(teacher), teacher, windows(), 1, what="perp", ordered=Ordered(), **FAST)
    for wrong in ({"energy": 0.0}, {"period": 0}, {"nuclear": -1.0}):
        with pytest.raises(OptionError, match="E-OPT-TRUNCATION"):
            Truncation(**wrong)
    with pytest.raises(OptionError, match="E-OPT-ORDERED"):
        Ordered(cut=1.0)


# --- adapters


def pruned(share=0.5):
    teacher = dense()
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        for layer in model.layers:
            w = layer.up.weight
            w[w.abs() < w.abs().flatten().kthvalue(int(share * w.numel())).values] = 0
    return teacher, model


KINDS = [("perp", None), ("perp", Adapter("scale", 4)), ("lora", None), ("dsee", None), ("dsee", Adapter("dsee", 2, sparse=9))]


@pytest.mark.parametrize(("what", "adapter"), KINDS)
def test_adapters_merge_into_a_weight_with_the_same_zeros(what, adapter):
    teacher, model = pruned()
    names, before, ids = [n for n, _ in model.named_modules()], state(model), windows(seed=9)

    def kl():
        with torch.no_grad():
            return float(divergence(model(ids).flatten(0, 1), teacher(ids).flatten(0, 1), torch.ones(ids.numel())))

    start = kl()
    report = effllm.recover(model, teacher, windows(), 30, what=what, adapter=adapter, **FAST)
    assert kl() < 0.8 * start
    assert [n for n, _ in model.named_modules()] == names  # no adapter is left
    for layer, i in zip(model.layers, range(3), strict=True):
        was = before[f"layers.{i}.up.weight"]
        assert torch.equal(layer.up.weight == 0, was == 0) and not torch.equal(layer.up.weight, was)
        # "perp" leaves weights alone that are not pruned; the head never gets an adapter
        assert torch.equal(layer.down.weight, before[f"layers.{i}.down.weight"]) == (what == "perp")
        assert torch.equal(layer.down.bias, before[f"layers.{i}.down.bias"]) == (what != "perp")
    assert torch.equal(model.head.weight, before["head.weight"])
    assert 0 < report.share < 0.7


@pytest.mark.parametrize("kind", ["mask", "scale", "dsee"])
def test_an_adapter_starts_as_nothing_and_merges_exactly(kind):
    _teacher, model = pruned()
    ids, before = windows(3), state(model)
    base = model(ids).detach()
    install(model, ["layers.0.up", "layers.1.down"], Adapter(kind, 3), None, 0)
    torch.testing.assert_close(model(ids), base, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for m in (m for m in model.modules() if isinstance(m, AdaptedLinear)):
            m.up.add_(0.1 * rand(*m.up.shape, dtype=torch.float32))
    with_adapter = model(ids).detach()
    kept = copy.deepcopy(model)
    remove(model, merge=True)
    torch.testing.assert_close(model(ids), with_adapter, rtol=1e-5, atol=1e-5)
    remove(kept, merge=False)
    assert same(state(kept), before)


def test_masks_and_their_errors():
    teacher, model = pruned()
    mask = torch.zeros(48, 24)
    mask[0] = 1
    before = state(model)
    effllm.recover(model, teacher, windows(), 3, what="lora", masks={"layers.0.up": mask}, **FAST)
    moved = (model.layers[0].up.weight != before["layers.0.up.weight"]).any(1)
    assert moved.tolist() == [True] + 47 * [False]
    for wrong in ({"masks": {"layers.0.norm": mask}}, {"masks": {"layers.0.up": mask.t()}}):
        now = state(model)
        with pytest.raises(OptionError, match="E-OPT-MASK"):
            effllm.recover(model, teacher, windows(), 1, what="lora", **FAST | wrong)
        assert same(state(model), now)
    for what, adapter in (("dsee", Adapter()), ("lora", Adapter("dsee")), ("factors", Adapter())):
        with pytest.raises(OptionError, match="E-OPT-ADAPTER"):
            effllm.recover(low_rank(teacher), teacher, windows(), 1, what=what, adapter=adapter, **FAST)
    with pytest.raises(OptionError, match=r"(?s)E-OPT-ADAPTER.*mask"):
        Adapter("masc")


def test_grebsmo_separates_what_was_put_together():
    low = rand(30, 4, dtype=torch.float32) @ rand(4, 40, seed=1, dtype=torch.float32)
    at = torch.randperm(1200, generator=torch.Generator().manual_seed(2))[:20].sort().values
    w = low.clone()
    w.view(-1)[at] += 8.0
    u, v, s = grebsmo(w, 4, rounds=20)
    assert torch.equal(support(s, 20), at)
    assert float((u @ v - low).norm() / low.norm()) < 0.05
    again = grebsmo(w, 4, rounds=20)
    assert all(torch.equal(a, b) for a, b in zip((u, v, s), again, strict=True))
    with pytest.raises(WeightError, match="E-WGT-RANK"):
        grebsmo(w, 31)
    with pytest.raises(WeightError, match="E-WGT-SPARSE"):
        support(s, 0)


def test_items_of_one_kind():
    assert isinstance(data(list(windows(4).split(2)), 5, 1), Data) and data(list(windows(4).split(2)), 5, 1).batch == 1
