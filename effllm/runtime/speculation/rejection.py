"""Accept drafted tokens so that what comes out is distributed as the target alone would have it.

Recursive rejection sampling (RSD, arXiv:2402.14160): K siblings are drawn without replacement from a draft distribution p, in the order
X_1 .. X_K. With q^1 = q and p^1 = p, X_k is accepted with probability min(1, q^k(X_k) / p^k(X_k)); else

    q^{k+1} = norm(max(q^k - p^k, 0))        p^{k+1} = p^k without X_k, renormalized

and where all are rejected, a token is drawn from q^{K+1}. The result has the distribution q exactly, whatever p is. K = 1 is speculative
sampling (arXiv:2211.17192). Each X_k must be judged by p^k: p in its place, or siblings with replacement, would bias the output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def acceptance(q: Tensor, p: Tensor, token: int) -> float:
    """min(1, q(token) / p(token)): the probability that a token drawn from p (V,) is accepted for q (V,)."""
    return min(1.0, float(q[token]) / float(p[token])) if p[token] > 0 else float(q[token] > 0)


def residual(q: Tensor, p: Tensor) -> Tensor:
    """norm(max(q - p, 0)) (V,): what is left for the target after a rejection. q itself where nothing is left, which only rounding reaches."""
    left = (q - p).clamp_min(0)
    total = left.sum()
    return left / total if total > 0 else q


def without(p: Tensor, token: int) -> Tensor:
    """p (V,) without a token, renormalized; zeros where it was the only one."""
    rest = p.clone()
    rest[token] = 0
    total = rest.sum()
    return rest / total if total > 0 else rest


def recursive(q: Tensor, p: Tensor, siblings: Sequence[int], uniform: Callable[[], float]) -> tuple[int | None, Tensor]:
    """Which of `siblings` (distinct tokens in sampling order) is accepted, by its index; else None. And what is left of q then.

    q and p are distributions (V,); `uniform()` gives numbers in [0, 1). In fp64: sums of V small numbers decide here.
    """
    q, p = q.double(), p.double()
    for k, token in enumerate(siblings):
        if uniform() < acceptance(q, p, token):
            return k, q
        q, p = residual(q, p), without(p, token)
    return None, q


def outcome(q: Tensor, p: Tensor, siblings: Sequence[int]) -> Tensor:
    """The distribution (V,) of the token that `recursive` and a draw from what is left give for these siblings; a check, not a sampler."""
    q, p = q.double(), p.double()
    out, reach = torch.zeros_like(q), 1.0
    for token in siblings:
        a = acceptance(q, p, token)
        out[token] += reach * a
        reach *= 1 - a
        q, p = residual(q, p), without(p, token)
    return out + reach * q
