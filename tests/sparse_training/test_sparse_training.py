"""Schedules, straight-through masks, AdamS and losses: each piece does what its formula says."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from effllm.errors import OptionError, RecipeError, WeightError
from effllm.solvers.nm import magnitude, nm_mask
from effllm.sparse_training import SR_STE, AdamS, RowScaled, decay, distilled, geometric, masked_linear, masked_weight, pattern_at, squarehead, stepwise


def test_decay_falls_from_one_to_zero() -> None:
    for kind in ("linear", "exp"):
        values = [decay(t, 200, kind=kind) for t in range(200)]
        assert values[0] == 1.0 and values[180:] == [0.0] * 20
        assert all(b <= a for a, b in itertools.pairwise(values))
    assert decay(30, 200) == pytest.approx(0.7) and decay(150, 200) == 0.0
    assert decay(30, 200, kind="exp") == pytest.approx(math.exp(-0.3))
    for bad in ({"kind": "cosine"}, {"coefficient": 0.0}, {"hard": 1.5}):
        with pytest.raises(OptionError, match="E-OPT-SCHEDULE"):
            decay(0, 10, **bad)  # type: ignore[arg-type]


def test_patterns_tighten_in_equal_frames() -> None:
    assert stepwise(1, 8) == [(7, 8), (4, 8), (2, 8), (1, 8)]
    assert stepwise(2, 4) == [(3, 4), (2, 4)]
    assert geometric(1, 8) == [(8, 64), (4, 32), (2, 16), (1, 8)]
    frames = [pattern_at(t, 100, stepwise(1, 8)) for t in range(120)]
    assert [frames.count(p) for p in stepwise(1, 8)] == [25, 25, 25, 45]  # the last 20 lie beyond the end
    w = torch.randn(4, 64)
    for n, m in stepwise(1, 8) + geometric(1, 8):
        assert (nm_mask(magnitude(w), n, m).view(4, -1, m).sum(-1) == n).all()
    for n, m in ((3, 8), (4, 4), (0, 4)):
        with pytest.raises(OptionError, match="E-OPT-SCHEDULE"):
            stepwise(n, m)
    with pytest.raises(OptionError, match="E-OPT-SCHEDULE"):
        pattern_at(0, 0, [(2, 4)])


def test_masked_linear_between_dense_and_sparse() -> None:
    w, x, bias = torch.randn(6, 16), torch.randn(3, 16), torch.randn(6)
    keep = nm_mask(magnitude(w), 2, 4)
    torch.testing.assert_close(masked_linear(x, w, bias, 2, 4, decay=1.0), functional.linear(x, w, bias))
    torch.testing.assert_close(masked_linear(x, w, bias, 2, 4), functional.linear(x, w * keep, bias))
    torch.testing.assert_close(masked_weight(w, keep, decay=0.25), torch.where(keep, w, w / 4))


def test_gradient_is_straight_through_and_sr_ste_adds_its_pull() -> None:
    w, x = torch.randn(6, 16, requires_grad=True), torch.randn(3, 16)
    seed = torch.randn(3, 6)
    masked_linear(x, w, None, 2, 4, decay=0.3).backward(seed)
    assert w.grad is not None
    torch.testing.assert_close(w.grad, seed.t() @ x)
    w.grad = None
    masked_linear(x, w, None, 2, 4, pull=SR_STE).backward(seed)
    keep = nm_mask(magnitude(w), 2, 4)
    torch.testing.assert_close(w.grad, seed.t() @ x + SR_STE * ~keep * w)


def grads(w: nn.Parameter, step: int) -> torch.Tensor:
    return torch.randn(w.shape, generator=torch.Generator().manual_seed(step))


def test_at_alpha_zero_the_mask_has_no_say() -> None:
    start = torch.randn(4, 8)
    ends = []
    for pattern in ((2, 4), (1, 4), None):
        w = nn.Parameter(start.clone())
        optimizer = AdamS([w], total=10**12, lr=1e-2, pattern=pattern, every=1)
        for t in range(20):
            w.grad = grads(w, t)
            optimizer.step()
        ends.append(w.detach().clone())
    torch.testing.assert_close(ends[0], ends[1])
    torch.testing.assert_close(ends[0], ends[2])
    assert (ends[0] - start).abs().max() > 0.01


def test_masked_weights_shrink_without_gradients_and_kept_ones_stay() -> None:
    start = torch.randn(4, 8, generator=torch.Generator().manual_seed(5)) + 0.5
    w = nn.Parameter(start.clone())
    optimizer = AdamS([w], total=1, lr=1e-3, pattern=(2, 4))
    keep = nm_mask(magnitude(w), 2, 4)
    last = w.detach().clone()
    for _ in range(30):
        w.grad = torch.zeros_like(w)
        optimizer.step()
        moving = ~keep & (last.abs() > 0.02)  # the first steps are about ten times lr, because v is of the mixed moment
        assert moving.any() and (w[moving].abs() < last[moving].abs()).all()
        assert torch.equal(w[keep], start[keep])
        last = w.detach().clone()


def test_one_step_by_hand() -> None:
    start = torch.tensor([[4.0, -3.0, 0.2, -0.1]])
    w = nn.Parameter(start.clone())
    g = torch.tensor([[1.0, -2.0, 3.0, 0.5]])
    optimizer = AdamS([w], total=4, lr=0.1, betas=(0.9, 0.5), pull=0.3, pattern=(2, 4))
    w.grad = g
    optimizer.step()
    alpha = 0.25
    mu = 0.1 * g
    mixed = torch.where(torch.tensor([[True, True, False, False]]), mu, (1 - alpha) * mu + alpha * 0.3 * start.sign())
    expected = start - 0.1 * (mixed / 0.1) / ((0.5 * mixed**2 / 0.5).sqrt() + 1e-8)
    torch.testing.assert_close(w.detach(), expected)


def test_training_drives_to_the_pattern_so_that_the_last_cut_is_small() -> None:
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(256, 32, generator=gen)
    y = x @ torch.randn(32, 8, generator=gen)
    ends = []
    for pattern in ((2, 4), None):
        w = nn.Parameter(torch.randn(8, 32, generator=torch.Generator().manual_seed(1)) * 0.1)
        optimizer = AdamS([w], total=600, lr=1e-2, pull=2.0, pattern=pattern)
        for _ in range(600):
            optimizer.zero_grad()
            functional.mse_loss(x @ w.t(), y).backward()
            optimizer.step()
        keep = nm_mask(magnitude(w), 2, 4)
        removed = float((w.detach() * ~keep).abs().max())
        before = x @ w.detach().t()
        if pattern is not None:
            masks = optimizer.finish()
            assert torch.equal(masks[w], keep) and (w.detach()[~keep] == 0).all()
            assert float((x @ w.detach().t() - before).abs().max()) <= removed * float((x.abs() @ (~keep).float().t()).max()) * 1.001
        ends.append(removed)
    assert ends[0] < 0.05 * ends[1]


def test_half_precision_keeps_an_exact_copy() -> None:
    half, full = nn.Parameter(torch.ones(2, 4, dtype=torch.bfloat16)), nn.Parameter(torch.ones(2, 4))
    first, second = (AdamS([p], total=10, lr=1e-4) for p in (half, full))
    for _ in range(100):  # each step alone is below the resolution of bf16
        half.grad, full.grad = torch.ones_like(half), torch.ones_like(full)
        first.step()
        second.step()
    assert torch.equal(half.detach(), full.detach().bfloat16()) and (half < 1).all()
    again = AdamS([half], total=10, lr=1e-4)
    again.load_state_dict(first.state_dict())
    assert again.state[half]["step"] == 100


def test_optimizer_refuses_what_it_cannot_do() -> None:
    w = nn.Parameter(torch.randn(2, 6))
    with pytest.raises(WeightError, match="E-WGT-NM"):
        AdamS([w], total=10, pattern=(2, 4))
    with pytest.raises(RecipeError, match="E-RCP-PATTERN"):
        AdamS([w], total=10, pattern=(5, 4))
    with pytest.raises(OptionError, match="E-OPT-ADAMS"):
        AdamS([w], total=0)


def test_row_scales_start_neutral_train_and_fold() -> None:
    linear = nn.Linear(8, 3)
    x = torch.randn(5, 8)
    before = linear(x)
    scaled = RowScaled(linear)
    torch.testing.assert_close(scaled(x), before)
    scaled.scale.data = torch.tensor([[2.0, 1.0], [1.0, 3.0], [0.5, 1.0]])
    linear.weight.data[:, ::2] = 0
    expected = scaled(x)
    scaled(x).sum().backward()
    assert scaled.scale.grad is not None and linear.weight.grad is not None
    folded = scaled.fold()
    assert folded is linear and (linear.weight[:, ::2] == 0).all()
    torch.testing.assert_close(linear(x), expected)
    with pytest.raises(WeightError, match="E-WGT-NM"):
        RowScaled(nn.Linear(7, 3))


def test_squarehead_is_relative_per_layer() -> None:
    teacher = [torch.randn(2, 5, 8), 1000 * torch.randn(2, 5, 8)]
    assert float(squarehead(teacher, teacher)) == 0.0
    assert float(squarehead([torch.zeros_like(t) for t in teacher], teacher)) == pytest.approx(1.0)
    student = [t * 1.1 for t in teacher]
    assert float(squarehead(student, teacher)) == pytest.approx(0.01, rel=1e-3)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    broken = [t.clone() for t in student]
    broken[0][1, 3:] = 99.0
    assert float(squarehead(broken, teacher, mask)) == pytest.approx(0.01, rel=1e-3)
    leaf = teacher[0].clone().mul_(0.9).requires_grad_()
    squarehead([leaf], [teacher[0]]).backward()
    assert leaf.grad is not None
    with pytest.raises(OptionError, match="E-OPT-LAYERS"):
        squarehead(student, teacher[:1])


def test_distillation_mixes_two_losses() -> None:
    logits, labels = torch.randn(6, 11), torch.randint(0, 11, (6,))
    ce = functional.cross_entropy(logits, labels)
    torch.testing.assert_close(distilled(logits, logits, labels), ce * 2 / 3)
    other = torch.randn(6, 11)
    kl = (other.softmax(-1) * (other.log_softmax(-1) - logits.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(distilled(logits, other, labels), kl / 3 + ce * 2 / 3)
    torch.testing.assert_close(distilled(logits, other, labels, eta=0.0), ce)
    labels[2:] = -100
    torch.testing.assert_close(distilled(logits, other, labels, eta=0.0), functional.cross_entropy(logits[:2], labels[:2]))
