"""Losses of a recovery: distillation of logits, language modelling, and matching of block outputs.

    total = kl * T^2 * KL(teacher || student at temperature T) + lm * cross entropy + features * mean over blocks of SquareHead

KL and cross entropy are means over the targets in nats. SquareHead (arXiv 2310.06927; PELA, arXiv 2310.10700, distils features
too) is ||teacher - student||^2 / ||teacher||^2 of a block's output, here per token and then the mean, because a few tokens of a
language model have norms a thousand times the others'. Logits over a large vocabulary never exist as a whole: `head_gradient`
makes them, their loss and their gradient a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from effllm.errors import OptionError

_ROWS = 128  # rows of logits alive at once; with a vocabulary of 50k that is 25 MB a tensor in fp32
_NONE = -100  # a position without a next token


@dataclass(frozen=True)
class Weights:
    """Weights of the losses; `temperature` divides both models' logits."""

    kl: float = 1.0
    lm: float = 0.0
    features: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("kl", "lm", "features"):
            if not getattr(self, name) >= 0:
                raise OptionError("E-OPT-LOSS", f"the weight {name}={getattr(self, name)} of a loss is not at least 0", "give a weight of 0 or above")
        if not self.temperature > 0:
            raise OptionError("E-OPT-LOSS", f"a temperature of {self.temperature}", "give a temperature above 0")
        if self.kl + self.lm + self.features == 0:
            raise OptionError("E-OPT-LOSS", "all weights of the loss are 0", "give kl, lm or features a weight")


@dataclass
class Losses:
    """Unweighted means over one batch; None where a loss has no weight. `total` is the weighted sum."""

    total: float
    kl: float | None = None
    lm: float | None = None
    features: float | None = None


def head_gradient(
    hidden: Tensor,
    student: Callable[[Tensor], Tensor],
    teacher: Callable[[slice], Tensor] | None,
    targets: Tensor,
    mask: Tensor,
    weights: Weights,
) -> tuple[Tensor, Losses]:
    """Gradient (rows, d) of the logits' losses with respect to hidden states (rows, d), and the losses.

    student: hidden states to logits, and where its parameters require grad they get theirs here; teacher: a slice of rows to the
    teacher's logits; targets (rows,) int64 with -100 for none; mask (rows,), 0 for rows to leave out.
    """
    if not weights.kl and not weights.lm:
        return torch.zeros_like(hidden), Losses(0.0)
    leaf = hidden.detach().requires_grad_()
    rows, following = mask.sum().clamp_min(1), (targets != _NONE).sum().clamp_min(1)
    kl = lm = 0.0
    for start in range(0, len(hidden), _ROWS):
        at = slice(start, start + _ROWS)
        logits = student(leaf[at]).float()
        loss = logits.new_zeros(())
        if weights.kl and teacher is not None:
            with torch.no_grad():
                wanted = teacher(at).float()
            part = divergence(logits, wanted, mask[at], weights.temperature) / rows
            kl += float(part.detach())
            loss = loss + weights.kl * part
        if weights.lm:
            part = F.cross_entropy(logits, targets[at], ignore_index=_NONE, reduction="sum") / following
            lm += float(part.detach())
            loss = loss + weights.lm * part
        loss.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return leaf.grad, Losses(weights.kl * kl + weights.lm * lm, kl if weights.kl else None, lm if weights.lm else None)


def divergence(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 times the sum over rows of KL(teacher || student), from logits (rows, vocabulary) in fp32, in nats."""
    p = torch.log_softmax(teacher / temperature, -1)
    q = torch.log_softmax(student / temperature, -1)
    return (F.kl_div(q, p, reduction="none", log_target=True).sum(-1) * mask).sum() * temperature**2


def squarehead(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean over tokens of ||teacher - student||^2 / ||teacher||^2; states (..., d), mask (tokens,) with 0 for tokens to leave out."""
    s, t = (x.flatten(0, -2).float() for x in (student, teacher))
    ratio = (t - s).square().sum(-1) / t.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return (ratio * mask).sum() / mask.sum().clamp_min(1)


def next_tokens(ids: Tensor, mask: Tensor | None) -> Tensor:
    """Targets (windows, T) of token ids: each position's next token, -100 at the end and where the next token is padding."""
    out = torch.full_like(ids, _NONE)
    out[:, :-1] = ids[:, 1:]
    if mask is not None:
        out[:, :-1].masked_fill_(mask[:, 1:] == 0, _NONE)
    return out
