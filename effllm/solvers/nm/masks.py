"""Which weights stay: exactly n of every m consecutive inputs of a row, or a share of a row or a layer.

A group's ties are broken by position, so that a mask never keeps more or fewer than n (thresholds and unstable sorts do).
Scores: magnitude |w|; Wanda |w_ij| * ||x_j|| (arXiv 2306.11695); NoWag, the same on weights whose columns and then rows were brought
to unit norm (arXiv 2504.14569).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effllm.errors import CalibrationError, RecipeError, WeightError
from effllm.solvers.moments import Moments

_EPS = 1e-5  # of NoWag's norms: an empty row or column stays empty


@dataclass
class Pruned:
    """A solved weight (N, K), zero where the mask is False, and its mask (N, K) bool."""

    weight: Tensor
    mask: Tensor


def check_pattern(n: int, m: int) -> None:
    """RecipeError (E-RCP-PATTERN) unless 1 <= n <= m and m >= 2."""
    if not (1 <= n <= m and m >= 2):
        raise RecipeError("E-RCP-PATTERN", f"pattern {n}:{m} keeps {n} of {m} weights", "keep between 1 and m of every m, such as 2:4")


def check_weight(w: Tensor, m: int = 1) -> None:
    """WeightError for what cannot be pruned: E-WGT-DIM, E-WGT-META, E-WGT-NAN, and E-WGT-NM where m does not divide K."""
    if w.dim() != 2 or 0 in w.shape:
        raise WeightError("E-WGT-DIM", f"the weight has shape {tuple(w.shape)}, not (out, in)", "exclude the module with a dense rule")
    if w.is_meta:
        raise WeightError("E-WGT-META", "the weight is on the meta device and has no values", "load the model's weights first")
    if not torch.isfinite(w).all():
        raise WeightError("E-WGT-NAN", f"{int((~torch.isfinite(w)).sum())} of {w.numel()} weights are NaN or infinite", "repair the checkpoint")
    if w.shape[1] % m:
        raise WeightError("E-WGT-NM", f"{w.shape[1]} inputs are no multiple of {m}", "choose another pattern, or exclude the module with a dense rule")


def check_mask(mask: Tensor, shape: tuple[int, ...] | torch.Size, n: int, m: int) -> None:
    """WeightError (E-WGT-MASK) where a mask is for another shape or keeps more than n of a group."""
    if mask.shape != shape or mask.dtype != torch.bool:
        raise WeightError("E-WGT-MASK", f"a {mask.dtype} mask {tuple(mask.shape)} for a weight {tuple(shape)}", "make the mask from this weight")
    worst = int(mask.view(shape[0], -1, m).sum(-1).amax())
    if worst > n:
        raise WeightError("E-WGT-MASK", f"the mask keeps {worst} weights in a group of {m}", f"keep at most {n}")


def nm_mask(score: Tensor, n: int, m: int) -> Tensor:
    """The n largest scores of every m along the rows of score (N, K): mask (N, K) bool with exactly n per group."""
    check_pattern(n, m)
    check_weight(score, m)
    grouped = score.reshape(score.shape[0], -1, m)
    best = grouped.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    return torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, best, True).view(score.shape)


def ratio_mask(score: Tensor, ratio: float, *, per: str = "row") -> Tensor:
    """Without a pattern: prune `ratio` of the weights, smallest scores first, of each row (per="row") or of the layer.

    RecipeError (E-RCP-RATIO) for a ratio outside [0, 1) or one that empties every row.
    """
    check_weight(score)
    rows = score if per == "row" else score.reshape(1, -1)
    keep = kept(rows.shape[1], ratio)
    best = rows.sort(dim=-1, descending=True, stable=True).indices[:, :keep]
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(-1, best, True).view(score.shape)


def kept(count: int, ratio: float) -> int:
    """How many of `count` weights stay when `ratio` of them go."""
    left = round(count * (1 - ratio)) if 0 <= ratio < 1 else 0
    if left < 1:
        raise RecipeError("E-RCP-RATIO", f"pruning a share of {ratio} leaves none of {count} weights", "prune a share from 0 to just under 1")
    return left


def magnitude(w: Tensor) -> Tensor:
    """Scores |w| (N, K) fp32."""
    return w.detach().float().abs()


def wanda(w: Tensor, moments: Moments) -> Tensor:
    """Scores |w_ij| * rms of input j (N, K) fp32."""
    return magnitude(w) * rms(w, moments)


def nowag(w: Tensor, moments: Moments) -> Tensor:
    """NoWag-P's scores (N, K) fp32: Wanda's, on normalized weights."""
    return normalize(w)[0].abs() * rms(w, moments)


def normalize(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(W', rows (N,), columns (K,)) fp32 with w = rows[:, None] * W' * columns: columns of w, then rows of the rest, at unit norm."""
    w = w.detach().float()
    columns = w.norm(dim=0).clamp_min(_EPS)
    w = w / columns
    rows = w.norm(dim=1).clamp_min(_EPS)
    return w / rows[:, None], rows, columns


def rms(w: Tensor, moments: Moments) -> Tensor:
    """Root mean square (K,) of each input, fp32 on the weight's device."""
    moments.check(w.shape[1])
    if moments.count < 1:
        raise CalibrationError("E-CAL-UNSEEN", "the statistics hold no input", "collect them on this layer's inputs")
    return (moments.hessian.diagonal().double() / moments.count).clamp_min(0).sqrt().float().to(w.device)


def masked(w: Tensor, mask: Tensor) -> Pruned:
    """The weight with pruned values at zero, nothing else changed."""
    if mask.shape != w.shape or mask.dtype != torch.bool:
        raise WeightError("E-WGT-MASK", f"a {mask.dtype} mask {tuple(mask.shape)} for a weight {tuple(w.shape)}", "make the mask from this weight")
    return Pruned(w.detach() * mask, mask)


def row_loss(w: Tensor, q: Tensor, h: Tensor) -> Tensor:
    """e H e^T per row e of w - q (N,) fp64, for H (K, K): the squared error of the outputs, summed over calibration inputs."""
    e = (w.detach() - q).double()
    return ((e @ h.to(e)) * e).sum(1)


def target(w: Tensor, moments: Moments, damp: float = 0.01) -> Tensor:
    """The weight (N, K) fp32 whose outputs on the compressed prefix's inputs come nearest to the dense model's outputs.

    min_V sum |W d - V x|^2 + ridge |W - V|^2 over pairs of inputs (d dense, x now) has V = W (C + ridge) (H + ridge)^-1 with C = sum d x^T;
    for any other V' the loss is that minimum plus |(V - V') x|^2, so every solver below aims at V instead of W. The ridge is a share
    `damp` of H's mean diagonal. Without `moments.cross` this is w.
    """
    moments.check(w.shape[1])
    if moments.cross is None:
        return w.detach().float()
    h, c = moments.hessian.double().to(w.device), moments.cross.double().to(w.device)
    ridge = damp * float(h.diagonal().mean())
    eye = (ridge if ridge > 0 else 1.0) * torch.eye(len(h), dtype=h.dtype, device=h.device)
    factor = torch.linalg.cholesky((h + h.t()) / 2 + eye)
    return torch.cholesky_solve((w.detach().double() @ (c + eye)).t(), factor).t().float().contiguous()
