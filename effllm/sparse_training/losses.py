"""Losses of sparse fine-tuning against the dense model: SquareHead per layer, and CAST's mix of distillation and cross entropy.

SquareHead (arXiv 2310.06927): each layer's hidden states are compared to the teacher's, as a share of the teacher's own mean square, so
that layers with large activations do not drown the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from effllm.errors import OptionError

ETA = 1 / 3
_FLOOR = 1e-6  # of a teacher's mean square


def squarehead(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Mean over layers of MSE(student, teacher) / MSE(teacher, 0) for hidden states (batch, tokens, width); a scalar fp32.

    mask (batch, tokens) bool leaves out padding. OptionError (E-OPT-LAYERS) where the states do not pair up.
    """
    if len(student) != len(teacher) or not student or any(s.shape != t.shape for s, t in zip(student, teacher, strict=True)):
        cause = f"{len(student)} student and {len(teacher)} teacher states, or other shapes"
        raise OptionError("E-OPT-LAYERS", cause, "pass the hidden states of the same layers of both models")
    total = torch.zeros((), device=student[0].device)
    for s, t in zip(student, teacher, strict=True):
        s, t = s.float(), t.detach().float()
        if mask is not None:
            s, t = s[mask], t[mask]
        total = total + (s - t).square().mean() / t.square().mean().clamp_min(_FLOOR)
    return total / len(student)


def distilled(student: Tensor, teacher: Tensor, labels: Tensor, *, eta: float = ETA, temperature: float = 1.0) -> Tensor:
    """eta * T^2 * KL(teacher || student) + (1 - eta) * cross entropy for logits (tokens, vocabulary), labels (tokens,); -100 is left out."""
    seen = labels != -100
    student, teacher, labels = student[seen].float(), teacher[seen].detach().float(), labels[seen]
    log_s = functional.log_softmax(student / temperature, -1)
    log_t = functional.log_softmax(teacher / temperature, -1)
    divergence = functional.kl_div(log_s, log_t, log_target=True, reduction="batchmean") * temperature**2
    return eta * divergence + (1 - eta) * functional.cross_entropy(student, labels)
