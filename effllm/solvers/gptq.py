"""Second-order solver: codes that keep the layer's output, not its weight, close to dense.

Minimizes tr((W - Q) H (W - Q)^T), H = sum x x^T over calibration inputs x, in three steps:

1. Scales (and minima) per group by a search that weighs each column with H's diagonal; they stay fixed while codes are chosen.
2. Columns are rounded one after another, most important first; what a rounding loses is carried over to the columns that are
   still free through the Cholesky factor of H^-1 (arXiv 2210.17323, with static groups).
3. Refinement, see `refine`: closed-form scales given codes and coordinate descent on codes given scales, in turn, in the same
   metric (each step is kept row by row only where it lowers the loss).

H is damped by a share of its mean diagonal, which also gives columns that never saw an input a defined solution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.errors import CalibrationError
from effllm.methods import Bipolar
from effllm.runtime.formats import bipolar
from effllm.runtime.formats.base import Packed
from effllm.solvers.refine import Coded, refine
from effllm.solvers.search import choose, grouped, scale_dtype, solve_grid

DAMP = 0.01
ROUNDS = 2  # each takes about as long as the first pass; later ones gain one or two percent of the loss
_BLOCK = 128


def gptq(w: Tensor, params: Bipolar, hessian: Tensor, *, damp: float = DAMP, rounds: int = ROUNDS) -> Packed:
    """Pack w (N, K) with calibration statistics `hessian` (K, K) = sum x x^T, any positive scaling.

    `rounds` of refinement follow the first pass. Raises CalibrationError (E-CAL-HESSIAN) where the statistics do not fit.
    """
    n, k = w.shape
    h = damped(hessian.to(w.device), k, damp)
    dtype = scale_dtype(grouped(w, params.group), params.bits)
    weight = h.diagonal().float()
    grid = choose(w, params, dtype, weight)
    start, _ = solve_grid(w, params, grid, dtype, weight)
    low = None if start.minimum is None else start.minimum.view(n, -1)
    kp = bipolar.padded(k, params.group)
    near = Coded.of(start.codes.view(n, kp)[:, :k], start.scale.view(n, -1), low, params.bits, params.group, grid)
    dense = w.float().t().contiguous()
    done = refine(dense, h.float(), carry(dense, near, h), rounds)
    return _pack(done, k, kp)


def damped(hessian: Tensor, k: int, damp: float) -> Tensor:
    """H in fp64, scaled to mean diagonal 1, with `damp` added to the diagonal."""
    if hessian.shape != (k, k):
        raise CalibrationError("E-CAL-HESSIAN", f"the statistics have shape {tuple(hessian.shape)}, not {(k, k)}", "collect them on this layer's inputs")
    if not torch.isfinite(hessian).all():
        raise CalibrationError("E-CAL-HESSIAN", "the statistics hold NaN or Inf", "check the model's activations on the calibration text")
    h = hessian.double()
    mean = h.diagonal().mean()
    h = (h + h.t()) / (2 * mean) if mean > 0 else torch.zeros_like(h)
    h.diagonal().add_(damp if mean > 0 else 1.0)
    return h


def inverse_factor(h: Tensor) -> Tensor:
    """Upper triangular U with U^T U = H^-1, for positive definite H (K, K) fp64."""
    # H = V V^T with V upper triangular is the Cholesky factorization of H with its order reversed; then U = V^-1
    v = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)
    eye = torch.eye(h.shape[0], dtype=h.dtype, device=h.device)
    return torch.linalg.solve_triangular(v, eye, upper=True)


def carry(w: Tensor, start: Coded, h: Tensor) -> Coded:
    """Round w (K, N) column by column on the fixed grid of `start`, carrying errors over; h (K, K) fp64 positive definite."""
    k = w.shape[0]
    order = torch.argsort(h.diagonal(), descending=True)
    u = inverse_factor(h[order][:, order]).float()
    left = w[order].contiguous()
    group = (order // start.width).tolist()
    codes = torch.empty_like(left)
    for a in range(0, k, _BLOCK):
        b = min(a + _BLOCK, k)
        lost = torch.empty(b - a, w.shape[1], dtype=w.dtype, device=w.device)
        for i in range(a, b):
            codes[i], value = start.nearest(left[i], group[i])
            lost[i - a] = (left[i] - value) / u[i, i]
            if i + 1 < b:
                left[i + 1 : b].addr_(u[i, i + 1 : b], lost[i - a], alpha=-1)
        if b < k:
            left[b:].addmm_(u[a:b, b:].t(), lost, alpha=-1)
    back = torch.empty_like(codes)
    back[order] = codes
    return start.with_codes(back)


def _pack(done: Coded, k: int, kp: int) -> Packed:
    codes = torch.zeros(done.codes.shape[1], kp, dtype=torch.uint8, device=done.codes.device)
    codes[:, :k] = done.codes.t().to(torch.uint8)
    low = None if done.minimum is None else done.minimum.t()
    return bipolar.make(codes, done.scale.t(), low, k=k, bits=done.bits, group=done.group, grid=done.grid)
