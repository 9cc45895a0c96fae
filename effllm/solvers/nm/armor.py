"""ARMOR (arXiv 2510.05528): W is nearly A S B, an n:m sparse core S between block-diagonal A (N x N) and B (K x K).

Minimizes tr(E H E^T), E = W - A S B, by block coordinate descent from A = B = I. The paper takes a joint Adam step on A, B and the
values of S and one exact step on a sampled group per pair of blocks, 20,000 times. Given the two others, though, each part is a
least-squares problem that is solved here in closed form, so that some ten rounds get further:

    A_i   with P = S B:  A_i = (W H P^T)_i (P H P^T)_ii^-1                                 blocks are independent
    B_j   with G = A S:  B_j += (G_j^T G_j)^-1 (G^T E H)_jj H_jj^-1                         blocks in turn
    S     all groups in turn, see `core`: best places and values of every group given the rest of its row

No step raises the loss (ridges only shorten steps). Two metrics: "full" takes H = sum x x^T, damped, and w as it is; "diagonal" is the
paper's: H's diagonal only, on NoWag-normalized weights, norms folded into A and B at the end. Each starts from NoWag's mask or, where
the metric says that this is better, from SparseGPT's weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effllm.errors import RecipeError, WeightError, nearest
from effllm.solvers.gptq import DAMP, damped
from effllm.solvers.moments import Moments
from effllm.solvers.nm.core import sweep
from effllm.solvers.nm.masks import check_pattern, check_weight, nm_mask, normalize, nowag
from effllm.solvers.nm.sparsegpt import sparsegpt

METRICS = ("full", "diagonal")
ROUNDS = 20
TOLERANCE = 2e-3  # relative gain of a round below which the descent ends
_PARTS = 4  # rows of a block move in so many turns; more tighten the bound on how they meet and cost as much overhead
_RIDGE = 1e-6  # relative; keeps blocks solvable whose rows are empty


@dataclass
class Armor:
    """left (N / d, d, d), core (N, K) with mask (N, K) bool, right (K / d, d, d), fp32; `history`: loss at the start and after each round,
    relative to the zero matrix."""

    left: Tensor
    core: Tensor
    mask: Tensor
    right: Tensor
    history: list[float]

    def dense(self) -> Tensor:
        """A S B (N, K) fp32."""
        return times_right(times_left(self.left, self.core), self.right)


def times_left(a: Tensor, x: Tensor) -> Tensor:
    """Block-diagonal a (N / d, d, d) times x (N, K)."""
    return torch.bmm(a, x.view(a.shape[0], a.shape[1], -1)).view(x.shape)


def times_right(x: Tensor, b: Tensor) -> Tensor:
    """x (N, K) times block-diagonal b (K / d, d, d)."""
    blocks = x.view(x.shape[0], b.shape[0], b.shape[1]).transpose(0, 1)
    return torch.bmm(blocks, b).transpose(0, 1).reshape(x.shape)


def armor(
    w: Tensor,
    moments: Moments,
    n: int,
    m: int,
    *,
    block: int = 128,
    metric: str = "full",
    rounds: int = ROUNDS,
    tolerance: float = TOLERANCE,
    damp: float = DAMP,
) -> Armor:
    """Factors of w (N, K); the loss is never above that of NoWag's mask in the same metric, "full" or "diagonal".

    rounds=0 gives the start itself between identities. RecipeError: E-RCP-PATTERN, E-RCP-METRIC; WeightError: E-WGT-NM where m does not
    divide the block, E-WGT-BLOCK where the block does not divide N and K; CalibrationError (E-CAL-HESSIAN).
    """
    check_pattern(n, m)
    check_weight(w, m)
    rows, k = w.shape
    if rows % block or k % block:
        raise WeightError("E-WGT-BLOCK", f"{block} does not divide the weight's shape {(rows, k)}", "choose a block that divides both")
    if block % m:
        raise WeightError("E-WGT-NM", f"a block of {block} is no multiple of {m}", "choose a block that is")
    moments.check(k)
    mask = nm_mask(nowag(w, moments), n, m)
    hessian = moments.hessian.to(w.device)
    if metric == "full":
        h, aim = damped(hessian, k, damp).float(), w.detach().float()
        return _descend(aim, h, _best_start(aim, h, mask, moments, n, m, damp), (n, m, block, rounds, tolerance))
    if metric != "diagonal":
        raise RecipeError("E-RCP-METRIC", f"unknown metric {metric!r}", nearest(metric, METRICS))
    aim, out, into = normalize(w)
    diagonal = hessian.diagonal().double()
    h = torch.diag(diagonal / diagonal.mean().clamp_min(1e-300) + 1e-9).float()
    done = _descend(aim, h, (aim * mask, mask), (n, m, block, rounds, tolerance))
    done.left, done.right = done.left * out.view(-1, block, 1), done.right * into.view(-1, 1, block)
    return done


def _best_start(w: Tensor, h: Tensor, mask: Tensor, moments: Moments, n: int, m: int, damp: float) -> tuple[Tensor, Tensor]:
    """NoWag's masked weights or SparseGPT's, whichever lose less."""
    plain, updated = w * mask, sparsegpt(w, moments, n, m, damp=damp)
    first, second = _loss(w - plain, h), _loss(w - updated.weight, h)
    return (updated.weight, updated.mask) if second < first else (plain, mask)


def _loss(e: Tensor, h: Tensor) -> float:
    return float((e * (e @ h)).sum(dtype=torch.float64))


def _descend(w: Tensor, h: Tensor, start: tuple[Tensor, Tensor], plan: tuple[int, int, int, int, float]) -> Armor:
    n, m, d, rounds, tolerance = plan
    rows, k = w.shape
    core, mask = start
    eye = torch.eye(d, dtype=w.dtype, device=w.device)
    left, right = eye.repeat(rows // d, 1, 1), eye.repeat(k // d, 1, 1)
    wh = w @ h
    zero = max(float((w * wh).sum(dtype=torch.float64)), 1e-300)
    best = Armor(left, core, mask, right, [_loss(w - core, h) / zero])
    history = list(best.history)
    for count in range(rounds):
        left, eh = _left(left, times_right(core, right), h, wh)
        right, eh = _right(right, times_left(left, core), h, eh)
        core, mask = _core(left, core, mask, right, h, eh, n, m)
        loss = _loss(w - times_right(times_left(left, core), right), h) / zero
        if count:  # steps by parts creep along narrow valleys: go further the same way where that is better
            far = 1 + (count + 1) ** 0.5
            ahead = (best.left.lerp(left, far), torch.where(mask & best.mask, best.core.lerp(core, far), core), best.right.lerp(right, far))
            there = _loss(w - times_right(times_left(ahead[0], ahead[1]), ahead[2]), h) / zero
            if there < loss:
                (left, core, right), loss = ahead, there
        if not loss < history[-1]:
            break
        history.append(loss)
        best = Armor(left, core, mask, right, history)
        if loss > (1 - tolerance) * history[-2]:
            break
    return best


def _left(a: Tensor, p: Tensor, h: Tensor, wh: Tensor) -> tuple[Tensor, Tensor]:
    """Best A for P = S B (N, K), and E H (N, K) with it."""
    d = a.shape[1]
    ph = p @ h
    blocks = p.view(-1, d, p.shape[1])
    gram = torch.bmm(ph.view_as(blocks), blocks.transpose(1, 2)).double()
    right = torch.bmm(wh.view_as(blocks), blocks.transpose(1, 2)).double()
    ridge = _ridge(gram)
    factor = torch.linalg.cholesky((gram + gram.transpose(1, 2)) / 2 + ridge)
    a = torch.cholesky_solve((right + a.double() @ ridge).transpose(1, 2), factor).transpose(1, 2).to(a.dtype).contiguous()
    return a, wh - times_left(a, ph)


def _right(b: Tensor, g: Tensor, h: Tensor, eh: Tensor) -> tuple[Tensor, Tensor]:
    """Better B for G = A S (N, K), and E H (N, K) with it; one pass over the blocks."""
    d = b.shape[1]
    b, eh = b.clone(), eh.clone()
    blocks = g.view(g.shape[0], -1, d).transpose(0, 1)
    gram = torch.bmm(blocks.transpose(1, 2), blocks).double()
    outer = torch.linalg.cholesky(gram + _ridge(gram))
    own = torch.stack([h[j : j + d, j : j + d] for j in range(0, len(h), d)]).double()
    inner = torch.linalg.cholesky(own + _ridge(own))
    for j in range(len(b)):
        part = slice(j * d, (j + 1) * d)
        pull = (blocks[j].t() @ eh[:, part]).double()
        step = torch.cholesky_solve(torch.cholesky_solve(pull, outer[j]).t(), inner[j]).t().to(b.dtype)
        b[j] += step
        eh.addmm_(blocks[j] @ step, h[part], alpha=-1)
    return b, eh


def _core(a: Tensor, s: Tensor, mask: Tensor, b: Tensor, h: Tensor, eh: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Better S (N, K) and mask given A, B and E H; some rows of every block at a time."""
    d, k = a.shape[1], s.shape[1]
    c = times_right(times_right(h, b.transpose(1, 2).contiguous()).t().contiguous(), b.transpose(1, 2).contiguous())
    bh = times_left(b, h)
    s, mask, eh = s.clone().view(-1, d, k), mask.clone().view(-1, d, k), eh.clone().view(-1, d, k)
    size = -(-d // _PARTS)
    for p in range(0, d, size):
        part = slice(p, min(p + size, d))
        own = a[:, :, part]
        curve = torch.bmm(own.transpose(1, 2), own).abs().sum(-1).flatten()
        live = curve.clamp_min(1e-12 * float(curve.max()) + 1e-30)
        rows = torch.bmm(own.transpose(1, 2), eh).reshape(-1, k)
        gradient = times_right(rows, b.transpose(1, 2).contiguous()).t().contiguous()
        old = s[:, part].reshape(-1, k)
        new, keep = sweep(old.t().contiguous(), mask[:, part].reshape(-1, k).t().contiguous(), gradient, c, live, n, m)
        shape = (s.shape[0], -1, k)
        s[:, part], mask[:, part] = new.t().reshape(shape), keep.t().reshape(shape)
        if part.stop < d:
            eh -= torch.bmm(own, ((new.t() - old) @ bh).view(shape))
    return s.view(-1, k), mask.view(-1, k)


def _ridge(gram: Tensor) -> Tensor:
    """Diagonal matrices (J, d, d): a small share of each gram matrix's mean diagonal, and of the largest one's for empty blocks."""
    mean = gram.diagonal(dim1=1, dim2=2).mean(-1)
    size = _RIDGE * mean + 1e-9 * float(mean.max()) + 1e-30
    return size[:, None, None] * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
