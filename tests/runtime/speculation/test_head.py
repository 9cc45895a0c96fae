"""The acceptance head: its own blocks, the paper's loss, labels in [0, 1]."""

from __future__ import annotations

import torch

from effllm.runtime.speculation.head import REJECTION_WEIGHT, AcceptanceHead, labels, loss


def test_blocks_are_not_tied() -> None:
    head = AcceptanceHead(8, layers=3)
    assert len({id(p) for p in head.parameters()}) == 3 * 2 + 2
    assert head(torch.randn(5, 8)).shape == (5,) and head(torch.randn(2, 5, 8, dtype=torch.bfloat16)).dtype == torch.float32
    assert torch.allclose(head(torch.randn(4, 8)), head.logits(torch.randn(4, 8)).softmax(-1)[:, 1], atol=1) and head.logits(torch.zeros(1, 8)).shape == (1, 2)


def test_the_loss_is_smallest_where_the_weights_say() -> None:
    """For a constant label y the minimum over a is y / (y + w (1 - y)): a rejection weighs w times as much."""
    y = 0.8
    a = torch.linspace(0.01, 0.99, 981, dtype=torch.float64)
    values = torch.stack([loss(torch.stack([(1 - x).log(), x.log()])[None], torch.tensor([y])) for x in a])
    assert abs(float(a[values.argmin()]) - y / (y + REJECTION_WEIGHT * (1 - y))) < 2e-3
    even = torch.stack([loss(torch.stack([(1 - x).log(), x.log()])[None], torch.tensor([y]), 1.0) for x in a])
    assert abs(float(a[even.argmin()]) - y) < 2e-3


def test_labels() -> None:
    q = torch.tensor([[0.2, 0.8], [0.9, 0.1], [0.5, 0.5], [0.0, 1.0]])
    p = torch.tensor([[0.4, 0.6], [0.5, 0.5], [1.0, 0.0], [0.5, 0.5]])
    assert torch.allclose(labels(q, p, torch.tensor([0, 0, 1, 0])), torch.tensor([0.5, 1.0, 1.0, 0.0]))
