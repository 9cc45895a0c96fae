"""Checks a candidate before it is timed: its product against fp64 with the weight that it really stores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effllm.autotune.bench.candidate import Candidate

PRODUCTS = 1 << 33  # multiply-adds that a check may take in fp64; beyond it, outputs are sampled
ELEMENTS = 1 << 25  # of the weight that a check holds in fp64
ROWS = 64  # of the activations that are compared; all are computed


@dataclass(frozen=True)
class Result:
    """Relative error (Frobenius) against fp64, what is allowed, what it was compared with, and why it is refused (empty: it is not)."""

    error: float
    limit: float
    against: str
    refused: str = ""


def verify(candidate: Candidate, x: Tensor, dense: Tensor | None) -> Result:
    """Compare `candidate.output()` with the stored weight, or loosely with the `dense` weight (N, K) that it was made from.

    Allowed is twice the error of plain torch in x's dtype plus the candidate's floor; against the dense weight, `candidate.quality`.
    The candidate must have been loaded with x. Outputs that are not compared must still be finite.
    """
    y = candidate.output()
    n, k, m = y.shape[-1], x.shape[-1], x.shape[0]
    few = torch.arange(m, device=x.device)[:: max(1, m // ROWS)]
    index = sample(n, max(256, min(PRODUCTS // (k * len(few)), ELEMENTS // k)), x.device)
    stored = candidate.stored(index)
    if stored is None and dense is None:
        return Result(float("nan"), 0.0, "nothing", "its weight cannot be read back, and there is no dense weight to compare with")
    weight = dense[index].double() if stored is None and dense is not None else stored
    assert weight is not None
    true = candidate.activations(x)[few] @ weight.t()
    got = y.reshape(m, n)[few][:, index].double()
    error = distance(got, true)
    if stored is None:
        limit, against = candidate.quality, "dense weight"
    else:
        plain = torch.nn.functional.linear(x[few], weight.to(x.dtype)).double()
        limit, against = 2 * distance(plain, x[few].double() @ weight.t()) + candidate.floor, "stored weight"
    refused = ""
    if not error <= limit:  # so written, it holds for NaN too
        refused = f"relative error {error:.3g} against its {against}, {limit:.3g} is allowed"
    elif not bool(torch.isfinite(y).all()):
        refused = "its output is not finite"
    return Result(error, limit, against, refused)


def sample(n: int, count: int, device: torch.device | str) -> Tensor:
    """Outputs to compare: all of them, or `count` spread at random with the first and the last among them."""
    if count >= n:
        return torch.arange(n, device=device)
    g = torch.Generator().manual_seed(n)
    middle = torch.randperm(n - 2, generator=g)[: max(0, count - 2)] + 1
    return torch.cat([torch.tensor([0, n - 1]), middle]).sort().values.to(device)


def distance(y: Tensor, true: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((y.double() - true).norm() / true.norm().clamp_min(1e-30))
