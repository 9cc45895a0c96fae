"""CAST (arXiv 2509.25996): an optimizer that shrinks the weights that a mask will remove, while the model trains on them.

The forward pass stays dense. Every `every` steps the mask is the top n of m by |theta|. With alpha = t / total rising, the first moment of
a masked weight turns linearly from its gradient into an l1 pull:

    mu = beta1 mu + (1 - beta1) g;   mu~ = mu where kept, (1 - alpha) mu + alpha lambda sign(theta) where masked
    v  = beta2 v + (1 - beta2) mu~^2;   theta -= lr * (mu~ / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

v is of mu~, not of the gradient: small pulls are still normalized to steps of about lr. Half-precision weights are trained through an fp32
copy, because one step is below their resolution. At the end `finish` applies the mask.

Two scales per row make up for what a mask takes away: `RowScaled` trains them beside the weight and folds them into it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from effllm.errors import OptionError, WeightError
from effllm.solvers.nm.masks import check_pattern, check_weight, magnitude, nm_mask

EVERY = 10
PULL = 4e-7


class AdamS(torch.optim.Optimizer):
    """CAST's optimizer over parameters or groups of them; a group's `pattern` is (n, m) for weights (N, K), None for parameters without a mask.

    total: steps until alpha is 1; pull: lambda. Raises OptionError (E-OPT-ADAMS), RecipeError (E-RCP-PATTERN), WeightError (E-WGT-NM).
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        total: int,
        lr: float = 2e-5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        pull: float = PULL,
        pattern: tuple[int, int] | None = None,
        every: int = EVERY,
    ) -> None:
        if total < 1 or every < 1 or lr < 0 or pull < 0 or not all(0 <= b < 1 for b in betas):
            cause = f"total={total}, every={every}, lr={lr}, pull={pull}, betas={betas}"
            raise OptionError("E-OPT-ADAMS", cause, "give positive step counts, a learning rate and a pull from 0, and betas in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "pull": pull, "pattern": pattern, "every": every, "total": total})
        for group in self.param_groups:
            if group["pattern"] is not None:
                check_pattern(*group["pattern"])
                for p in group["params"]:
                    check_weight(p, group["pattern"][1])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad.float(), group)
        return loss

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["first"], state["second"] = torch.zeros_like(p, dtype=torch.float32), torch.zeros_like(p, dtype=torch.float32)
            if p.dtype != torch.float32:
                state["master"] = p.float()
        theta = state.get("master", p)
        beta1, beta2 = group["betas"]
        if group["pattern"] is not None and state["step"] % group["every"] == 0:
            state["mask"] = nm_mask(magnitude(theta), *group["pattern"])
        state["step"] += 1
        t = state["step"]
        first = state["first"].lerp_(grad, 1 - beta1)
        if group["pattern"] is not None:
            alpha = min(1.0, t / group["total"])
            first = torch.where(state["mask"], first, (1 - alpha) * first + alpha * group["pull"] * theta.sign())
        second = state["second"].mul_(beta2).addcmul_(first, first, value=1 - beta2)
        size = (second / (1 - beta2**t)).sqrt_().add_(group["eps"])
        theta.addcdiv_(first / (1 - beta1**t), size, value=-group["lr"])
        if theta is not p:
            p.copy_(theta)

    @torch.no_grad()
    def finish(self) -> dict[Tensor, Tensor]:
        """Apply each weight's n:m mask, made anew from |theta|; returns the masks by parameter."""
        masks = {}
        for group in self.param_groups:
            for p in group["params"] if group["pattern"] is not None else ():
                theta = self.state[p].get("master", p) if p in self.state else p
                masks[p] = nm_mask(magnitude(theta), *group["pattern"])
                theta.mul_(masks[p])
                p.copy_(theta)
        return masks


class RowScaled(nn.Module):
    """A Linear with `groups` trainable scales per row, each over K / groups neighbouring inputs, all 1 at first; `fold` gives it back.

    WeightError (E-WGT-NM) where groups does not divide K.
    """

    def __init__(self, linear: nn.Linear, groups: int = 2) -> None:
        super().__init__()
        n, k = linear.weight.shape
        if groups < 1 or k % groups:
            raise WeightError("E-WGT-NM", f"{k} inputs do not split into {groups} groups", "choose another number of scales per row")
        self.linear = linear
        self.scale = nn.Parameter(torch.ones(n, groups, dtype=torch.float32, device=linear.weight.device))

    def weight(self) -> Tensor:
        """The scaled weight (N, K)."""
        w = self.linear.weight
        return (w.view(len(w), self.scale.shape[1], -1) * self.scale.to(w.dtype).unsqueeze(-1)).view(w.shape)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) to (..., N)."""
        return functional.linear(x, self.weight(), self.linear.bias)

    @torch.no_grad()
    def fold(self) -> nn.Linear:
        """The Linear itself with the scales multiplied in; zeros stay zeros."""
        self.linear.weight.copy_(self.weight())
        return self.linear
