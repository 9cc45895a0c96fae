"""The acceptance head of SpecDec++ (arXiv:2405.19715): from a draft model's last hidden state at a drafted token to the probability that
the target accepts it.

`layers` residual blocks x + SiLU(W x + b), then a linear to two logits (rejected, accepted). The blocks are modules of their own; the
published code holds one block several times, which ties their weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

REJECTION_WEIGHT = 6.0  # a rejected token that was taken for accepted costs more than the reverse


class AcceptanceHead(nn.Module):
    """Hidden states (..., width) to acceptance probabilities (...), fp32."""

    def __init__(self, width: int, layers: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.out = nn.Linear(width, 2)
        for block in self.blocks:  # blocks start as identities: the head begins as a linear classifier
            nn.init.zeros_(block.weight)  # type: ignore[arg-type]
            nn.init.zeros_(block.bias)  # type: ignore[arg-type]

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., 2): rejected, accepted."""
        x = hidden.float()
        for block in self.blocks:
            x = x + nn.functional.silu(block(x))
        y: Tensor = self.out(x)
        return y

    def forward(self, hidden: Tensor) -> Tensor:
        """The probability that the token is accepted."""
        return self.logits(hidden).softmax(-1)[..., 1]


def loss(logits: Tensor, accepted: Tensor, rejection_weight: float = REJECTION_WEIGHT) -> Tensor:
    """Mean cross entropy of logits (T, 2) against soft labels `accepted` (T,) = min(1, q/p), with a weight on the rejected side."""
    log = logits.log_softmax(-1)
    accepted = accepted.to(log.dtype)
    return -(accepted * log[:, 1] + rejection_weight * (1 - accepted) * log[:, 0]).mean()


def labels(target: Tensor, draft: Tensor, tokens: Tensor) -> Tensor:
    """min(1, q/p) (T,) of drafted `tokens` (T,) under distributions (T, V); a token that the draft could not have drawn counts as certain."""
    q, p = (d.gather(-1, tokens[:, None])[:, 0] for d in (target, draft))
    return torch.where(p > 0, q / p.clamp_min(torch.finfo(p.dtype).tiny), torch.ones_like(q)).clamp_max(1.0)
