"""Small activations set to zero, in plain torch that compilers fuse: what a threshold means where no kernel skips anything.

    sparsify   x where |x| > threshold, else 0      threshold 1 or K values; calls of more than `limit` rows pass x through
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from effllm.lowering.op import Op, define
from effllm.lowering.sparse_linear import masked, thresholds_for


def sparsify_reference(x: Tensor, threshold: Tensor, limit: int) -> Tensor:
    """x (..., K) with small entries at zero; NaN stays. Never x itself: an op must not return an input."""
    found = thresholds_for(x, threshold, limit)
    return x.clone() if found is None else masked(x, found)


def low_rank_rest(x: Tensor, threshold: Tensor, u: Tensor, v: Tensor, limit: int) -> Tensor:
    """u v times the part of x (..., K) that a threshold skips, (..., N); zero in calls of more than `limit` rows."""
    found = thresholds_for(x, threshold, limit)
    rest = torch.zeros_like(x) if found is None else torch.where(masked(x, found) == 0, x, 0.0).to(x.dtype)
    return linear(linear(rest, v.to(x.dtype)), u.to(x.dtype))


SPARSIFY: Op = define("sparsify(Tensor x, Tensor threshold, int limit) -> Tensor", sparsify_reference, sparsify_reference)
