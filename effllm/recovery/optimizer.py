"""AdamW on fp32 masters in units of each tensor's own size, with warm-up and cosine decay.

A parameter p is stepped as p = scale * x, with scale the power of two nearest its root mean square: x is exact, and one learning
rate fits factors whatever split of the singular values their solver chose (U sqrt(S) and sqrt(S) V, or U S and V), as well as
norms and adapters. Adam's steps on x are the same for p and c * p. Gradients are summed in fp32 over micro-batches.

Masters, gradients and moments are all row-major: torch's fused AdamW walks them in memory order and does not compare strides, so
a column-major factor (as LAPACK's SVD returns it) beside a row-major moment would be stepped with another weight's moment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from effllm.errors import OptionError

_ZERO = 2.0**-5  # the size assumed of tensors that start at zero (adapters' outputs, biases): about that of a weight


def rate(step: int, steps: int, warmup: int, floor: float = 0.0) -> float:
    """Share of the learning rate at a step (0-based): linear warm-up, then a cosine down to `floor` behind the last step."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def scale_of(p: Tensor) -> float:
    """The power of two nearest to a tensor's root mean square."""
    size = float(p.detach().double().square().mean().sqrt())
    return 2.0 ** round(math.log2(size)) if size > 0 and math.isfinite(size) else _ZERO


def _flat(t: Tensor) -> Tensor:
    """fp32, row-major."""
    return t.detach().float().contiguous()


class Masters:
    """fp32 copies of parameters with AdamW on them. Call `collect` after each backward pass, then `step` once."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, betas: tuple[float, float] = (0.9, 0.95), decay: float = 0.0, clip: float | None = 1.0
    ) -> None:
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1) or decay < 0 or (clip is not None and clip <= 0):
            raise OptionError("E-OPT-OPTIMIZER", f"betas={betas}, decay={decay}, clip={clip}", "betas in [0, 1), decay at least 0, clip above 0 or None")
        self.parameters, self.clip = dict(parameters), clip
        self.scales = {n: scale_of(p) for n, p in self.parameters.items()}
        self.x = {n: (_flat(p) / self.scales[n]).requires_grad_() for n, p in self.parameters.items()}
        # decay is for matrices: norms, biases and the values of a sparse matrix keep their size
        groups = [
            {"params": [x for x in self.x.values() if x.dim() > 1], "weight_decay": decay},
            {"params": [x for x in self.x.values() if x.dim() <= 1], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, eps=1e-12, fused=True)

    @torch.no_grad()
    def collect(self, share: float = 1.0) -> None:
        """Move the parameters' gradients, times `share`, into the masters'."""
        for name, p in self.parameters.items():
            if p.grad is None:
                continue
            g = _flat(p.grad).mul(share * self.scales[name])
            x = self.x[name]
            x.grad = g if x.grad is None else x.grad.add_(g)
            p.grad = None

    @torch.no_grad()
    def add_gradient(self, name: str, gradient: Tensor) -> None:
        """Add the gradient of a regulariser with respect to a parameter."""
        x, g = self.x[name], _flat(gradient) * self.scales[name]
        x.grad = g if x.grad is None else x.grad.add_(g)

    @torch.no_grad()
    def norm(self) -> float:
        """Length of the whole gradient in units of the parameters' sizes; NaN or Inf where a gradient is."""
        grads = [x.grad for x in self.x.values() if x.grad is not None]
        return float(torch.stack([g.norm() for g in grads]).norm()) if grads else 0.0

    @torch.no_grad()
    def step(self, lr: float, norm: float) -> None:
        """One AdamW step with gradients clipped from `norm` to `clip`; the parameters follow their masters."""
        if self.clip is not None and norm > self.clip:
            torch._foreach_mul_([x.grad for x in self.x.values() if x.grad is not None], self.clip / norm)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        self.adam.zero_grad()
        self.write()

    @torch.no_grad()
    def write(self) -> None:
        """Set the parameters to their masters, rounded to the parameters' dtype."""
        for name, p in self.parameters.items():
            p.copy_(self.x[name] * self.scales[name])

    @torch.no_grad()
    def replace(self, name: str, value: Tensor) -> None:
        """Set a parameter and its master (after a projection)."""
        self.x[name].copy_(value.float() / self.scales[name])
        self.parameters[name].copy_(value)

    def value(self, name: str) -> Tensor:
        """A parameter in fp32."""
        return self.x[name].detach() * self.scales[name]

    def state(self) -> dict[str, Tensor]:
        """Masters and moments by name, for a checkpoint; views, not copies."""
        out: dict[str, Tensor] = {}
        for name, x in self.x.items():
            out[f"master.{name}"] = x.detach()
            for key, value in self.adam.state.get(x, {}).items():
                out[f"{key}.{name}"] = value
        return out

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], scales: Mapping[str, float]) -> None:
        """Continue from `state()`; shapes are the caller's to check."""
        self.scales = dict(scales)
        for name, x in self.x.items():
            x.copy_(state[f"master.{name}"])
            kept = {key: state[f"{key}.{name}"].to(x.device, copy=True) for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in state}
            if kept:
                self.adam.state[x] = kept
        self.write()
