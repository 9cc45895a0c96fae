"""Store factors: as they are in 16 or 32 bits, or quantized so that the product's output error stays small.

B is quantized against H, the second moment of its input. A's input is what the quantized B makes of x, z = B x, with the second moment
B H B^T, so A is first fitted again to that B in closed form and then quantized against it. In pivoted form the rows of B are outputs
themselves, and A aims at the other rows of the dense target given what B became.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.recipe import Bipolar
from effllm.runtime.formats import bipolar, dense, lowrank
from effllm.runtime.formats.base import Packed
from effllm.solvers.gptq import gptq
from effllm.solvers.lowrank.factors import Factors
from effllm.solvers.lowrank.metric import DAMP
from effllm.solvers.moments import Moments
from effllm.solvers.search import search


def store(factors: Factors, dtype: torch.dtype = torch.bfloat16) -> Packed:
    """Pack the factors as dense matrices in `dtype`."""
    a, b = (dense.make(t.to(dtype)) for t in (factors.a, factors.b))
    return lowrank.make(a, b, shape=factors.shape, shift=factors.shift, channels=factors.channels, pivots=factors.pivots)


def quantize(factors: Factors, params: Bipolar, moments: Moments | None = None, *, damp: float = DAMP) -> Packed:
    """Pack the factors as bipolar integers (`params`: bits, group, offset, pad). Without moments each is rounded by itself."""
    a, b = factors.a.float(), factors.b.float()
    if moments is None:
        pa, pb = search(a, params), search(b, params)
    else:
        moments.check(factors.shape[1])
        h = moments.hessian.to(b.device)
        pb = gptq(b, params, h)
        pa = _second(factors, bipolar.unpack(pb).double(), params, h.double(), damp)
    return lowrank.make(pa, pb, shape=factors.shape, shift=factors.shift, channels=factors.channels, pivots=factors.pivots)


def _second(factors: Factors, b: Tensor, params: Bipolar, h: Tensor, damp: float) -> Packed:
    """A, fitted to the stored B and quantized against what it reads."""
    reads = b if factors.channels is None else torch.cat([b, torch.eye(factors.shape[1], dtype=b.dtype, device=b.device)[factors.channels.long()]])
    wanted = factors.b.double() if factors.channels is None else torch.cat([factors.b.double(), reads[b.shape[0] :]])
    inner = reads @ h @ reads.t()
    inner = (inner + inner.t()) / 2
    solid = inner.clone()
    solid.diagonal().add_(damp * float(inner.diagonal().mean()))
    # A B H B_q^T = A_q (B_q H B_q^T), damped towards A itself
    a = factors.a.double()
    off = (a @ (wanted @ h @ reads.t())) - a @ inner
    a = a + torch.cholesky_solve(off.t(), torch.linalg.cholesky(solid)).t()
    return gptq(a.float(), params, inner.float())
