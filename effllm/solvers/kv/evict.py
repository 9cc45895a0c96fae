"""Evict, then merge tokens of a prompt, head by head (after EMS, arXiv:2412.08521; a reconstruction: no code was published).

Approximate by nature, and by what is known of the method: scores, grouping and merging follow its public descriptions, constants are ours.
Keys are those after the rotation and keep their positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effllm.errors import CacheError

COMBINE = ("max", "sum")
GLOBAL = ("visible", "flat")


@dataclass(frozen=True)
class Kept:
    """What stays of a prompt: keys and values (B, G, b, D), original positions (B, G, b) int64 rising, scores (B, G, b), and the log of how much
    attention a merged token stands for relative to its centre (B, G, b), zero where nothing was merged into it."""

    keys: Tensor
    values: Tensor
    positions: Tensor
    scores: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Seen:
    """What queries paid to keys, (B, G, T) fp32: the sum over queries (of A, or of (j + 1) A), how many queries saw the key, and the mean of
    the last `window` queries that were given."""

    total: Tensor
    queries: Tensor
    local: Tensor


def observe(q: Tensor, k: Tensor, scale: float, *, window: int, kind: str = "visible", mask: Tensor | None = None, block: int = 256) -> Seen:
    """Attention that the last n tokens, q (B, H, n, D), pay to all keys k (B, G, T, D), causal; query heads of a key head are summed.

    mask (B, T) bool says which tokens are real (left padding). No n x T matrix is held: `block` queries at a time. Raises CacheError (E-KVC-SCORE).
    """
    if kind not in GLOBAL:
        raise CacheError("E-KVC-SCORE", f"global score {kind!r}", f"valid: {', '.join(GLOBAL)}")
    b, h, n, _ = q.shape
    g, t = k.shape[1:3]
    real = torch.ones(b, t, dtype=torch.bool, device=q.device) if mask is None else mask
    total, local = torch.zeros(b, g, t, device=q.device), torch.zeros(b, g, t, device=q.device)
    count = torch.zeros(b, g, t, device=q.device)
    place = real.long().cumsum(-1)  # 1 for the first real token
    for start in range(0, n, block):
        rows = torch.arange(start, min(n, start + block), device=q.device)
        at = rows + t - n
        s = torch.einsum("bgrqd,bgkd->bgrqk", q[:, :, rows].float().unflatten(1, (g, h // g)), k.float()) * scale
        see = (torch.arange(t, device=q.device) <= at[:, None]) & real[:, None, :]
        a = torch.softmax(s.masked_fill(~see[:, None, None], -torch.inf), -1).nan_to_num(0.0)
        a = a.sum(2) * real[:, None, at, None]
        total += (a * place[:, None, at, None] if kind == "flat" else a).sum(2)
        count += (see & real[:, at, None]).sum(1)[:, None]
        local += (a * (rows >= n - window)[:, None]).sum(2)
    return Seen(total, count, local / min(window, n))


def attention_scores(
    q: Tensor, k: Tensor, scale: float, *, window: int, kind: str = "visible", mask: Tensor | None = None, block: int = 256
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Global and local score of every key of a whole prompt, (B, G, T) each; arguments as for `observe`.

    global: mean attention from the queries that see the key ("visible"), or the mean over all of (j + 1) A[j, i], flat under uniform attention
    ("flat"). local: mean attention from the last `window` queries.
    """
    seen = observe(q, k, scale, window=window, kind=kind, mask=mask, block=block)
    most = seen.queries.amax(-1, keepdim=True) if kind == "flat" else seen.queries
    return seen.total / most.clamp_min(1), seen.local


def combine(wide: Tensor, local: Tensor, *, how: str = "max", pool: int = 5) -> Tensor:
    """One score (B, G, T): the local one averaged over `pool` neighbours, the global one scaled to the same mean, then the larger or the sum."""
    if how not in COMBINE:
        raise CacheError("E-KVC-SCORE", f"combine={how!r}", f"valid: {', '.join(COMBINE)}")
    if pool % 2 == 0:
        raise CacheError("E-KVC-SCORE", f"pool={pool}", "an odd number of neighbours")
    smooth = torch.nn.functional.avg_pool1d(local, pool, 1, pool // 2, count_include_pad=False)
    level = wide.mean(-1, keepdim=True)
    aligned = wide * (smooth.mean(-1, keepdim=True) / torch.where(level == 0, 1.0, level))
    return torch.maximum(aligned, smooth) if how == "max" else aligned + smooth


def redundancy(k: Tensor, v: Tensor, ck: Tensor, cv: Tensor) -> Tensor:
    """cos(k, centre) * cos(v, centre), each clipped at zero first: two opposites are not alike. (..., m, D), (..., c, D) -> (..., m, c)."""
    unit = torch.nn.functional.normalize
    sides = [(unit(a.float(), dim=-1) @ unit(c.float(), dim=-1).mT).clamp_min(0) for a, c in ((k, ck), (v, cv))]
    return sides[0] * sides[1]


def compress(
    k: Tensor, v: Tensor, score: Tensor, *, budget: int, window: int = 32, sinks: int = 4, centres: float = 0.6, threshold: float = 0.7,
    merge: int | None = None, merge_keys: bool = False, weighted: bool = False, positions: Tensor | None = None, weight: Tensor | None = None,
) -> Kept:  # fmt: skip
    """Keep `budget` of the T tokens of every head: k, v (B, G, T, D), score (B, G, T).

    The last `window` tokens and the first `sinks` always stay, then the highest scores. The next `merge` tokens (default: half the budget, at most
    what is there) are merged into the kept ones outside the window that they resemble most, at most `centres` of the budget, the highest scores;
    those below `threshold` go to the zero class, that is, are evicted like all the rest. `merge_keys=False` merges values only, since keys of
    distant positions are rotated differently. `weighted` returns the log of the merged attention mass for the logits, else zeros; `weight` is
    what earlier rounds returned. Raises CacheError (E-KVC-BUDGET) where window and sinks do not fit.
    """
    t = k.shape[2]
    if budget < window + sinks + 1:
        raise CacheError("E-KVC-BUDGET", f"budget={budget} for a window of {window} and {sinks} sinks", "a budget above their sum")
    at = torch.arange(t, device=k.device).expand(score.shape) if positions is None else positions
    old = torch.zeros_like(score) if weight is None else weight
    if t <= budget:
        return Kept(k, v, at, score, old)
    rank = score.clone()
    rank[..., t - window :] = torch.inf
    rank[..., :sinks] = torch.inf
    order = rank.argsort(dim=-1, descending=True, stable=True)
    kept = order[..., :budget].sort(-1).values
    extra = min(budget // 2 if merge is None else merge, t - budget)
    rows = _rows(kept, k.shape[-1])
    new_k, new_v, new_w = k.gather(2, rows), v.gather(2, rows), old.gather(2, kept)
    s = score.gather(2, kept)
    if extra > 0:
        take = order[..., budget : budget + extra]
        new_k, new_v, new_w = _merge(
            (k.gather(2, _rows(take, k.shape[-1])), v.gather(2, _rows(take, v.shape[-1])), score.gather(2, take)), (new_k, new_v, s, new_w),
            kept >= t - window, max(1, int(centres * budget)), threshold, merge_keys, weighted,
        )  # fmt: skip
    return Kept(new_k, new_v, at.gather(2, kept), s, new_w)


def _rows(index: Tensor, d: int) -> Tensor:
    return index[..., None].expand(*index.shape, d)


def _merge(
    loose: tuple[Tensor, Tensor, Tensor], held: tuple[Tensor, Tensor, Tensor, Tensor], window: Tensor, count: int, threshold: float,
    merge_keys: bool, weighted: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (k, v, a), (ck, cv, ca, cw) = loose, held
    count = min(count, ck.shape[2])
    middle = ca.masked_fill(window, -torch.inf)
    least = middle.topk(count, -1).values[..., -1:]
    centre = (middle >= least) & ~window
    alike = redundancy(k, v, ck, cv).masked_fill(~centre[:, :, None], -1.0)
    best, to = alike.max(-1)
    share = torch.where(best >= threshold, a.float(), 0.0).clamp_min(0)  # the zero class carries nothing
    own = ca.float().clamp_min(1e-20)
    mass = own.scatter_add(2, to, share)
    touched = (mass > own)[..., None]

    def averaged(mine: Tensor, others: Tensor) -> Tensor:
        rows = to[..., None].expand(*to.shape, mine.shape[-1])
        return (own[..., None] * mine.float()).scatter_add(2, rows, share[..., None] * others.float()) / mass[..., None]

    value = torch.where(touched, averaged(cv, v).to(cv.dtype), cv)
    if merge_keys:
        unit = torch.nn.functional.normalize
        turned = unit(averaged(unit(ck.float(), dim=-1), unit(k.float(), dim=-1)), dim=-1) * ck.float().norm(dim=-1, keepdim=True)
        ck = torch.where(touched, turned.to(ck.dtype), ck)
    return ck, value, cw + (torch.log(mass / own) if weighted else 0.0)
