"""Second moments of gradients: per weight for Fisher-weighted solvers, and of a layer's outputs for those that weigh output directions.

Loss: the summed next-token loss of a window. With `sampled` the targets are drawn from the model itself, which makes the moment the
Fisher information, the curvature of the KL divergence to the model as it is; else they are the text's own tokens (FWSVD's choice).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effllm.errors import CalibrationError


@dataclass
class Gradients:
    """Of one layer: weight (N, K) = mean over windows of the squared gradient; outputs (N, N) = mean over tokens of g g^T. fp32."""

    weight: Tensor | None
    outputs: Tensor


def gradients(
    model: Any, windows: Iterable[Tensor], linears: Mapping[str, nn.Module], *, weights: bool = False, sampled: bool = True, seed: int = 0
) -> dict[str, Gradients]:
    """Run the model forward and backward over windows of token ids (T,). The model's parameters and their grads stay as they are.

    CalibrationError: E-CAL-GRAD where a gradient is NaN or infinite, E-CAL-SHORT without a window of two tokens.
    """
    sums: dict[str, Gradients] = {}
    leaves: list[Tensor] = []
    generator = torch.Generator().manual_seed(seed)
    state = [(p, p.requires_grad) for p in model.parameters()]
    handles = [m.register_forward_hook(_output_hook(sums, name, leaves)) for name, m in linears.items()]
    own: list[Tensor] = [m.get_parameter("weight") for m in linears.values()] if weights else []
    count = tokens = 0
    try:
        for p, _ in state:
            p.requires_grad_(False)
        for w in own:
            w.requires_grad_(True)
        for ids in windows:
            leaves.clear()
            loss = _loss(model, ids, sampled, generator)
            if loss is None:
                continue
            found = torch.autograd.grad(loss, [*own, *leaves], allow_unused=True)
            for name, g in zip(linears if weights else (), found, strict=False):
                if g is not None:
                    _add(sums[name], g)
            count, tokens = count + 1, tokens + ids.numel() - 1
    finally:
        for handle in handles:
            handle.remove()
        for p, wanted in state:
            p.requires_grad_(wanted)
    if tokens <= 0:
        raise CalibrationError("E-CAL-SHORT", "there is no window with two tokens", "give a longer text")
    for name, s in sums.items():
        s.outputs /= tokens
        if s.weight is not None:
            s.weight /= count
        for t in (s.outputs, s.weight):
            if t is not None and not torch.isfinite(t).all():
                raise CalibrationError("E-CAL-GRAD", f"the gradients of {name} hold NaN or Inf", "run the backward pass in fp32 or bf16, and check the loss")
    return sums


def _loss(model: Any, ids: Tensor, sampled: bool, generator: torch.Generator) -> Tensor | None:
    if ids.numel() < 2:
        return None
    with torch.enable_grad():
        logits = model(input_ids=ids.view(1, -1), use_cache=False).logits[0, :-1].float()
        targets = ids.view(-1)[1:]
        if sampled:
            targets = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0].to(ids.device)
        return nn.functional.cross_entropy(logits, targets, reduction="sum")


def _output_hook(sums: dict[str, Gradients], name: str, leaves: list[Tensor]) -> Any:
    def see(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        def arrived(g: Tensor) -> None:
            flat = g.detach().reshape(-1, g.shape[-1]).float()
            if name not in sums:
                sums[name] = Gradients(None, torch.zeros(flat.shape[1], flat.shape[1], device=flat.device))
            sums[name].outputs.addmm_(flat.t(), flat)

        if not out.requires_grad:  # nothing before it needs a gradient: here the backward pass may end
            out = out.detach().requires_grad_(True)
            leaves.append(out)
        out.register_hook(arrived)
        return out

    return see


def _add(sums: Gradients, g: Tensor) -> None:
    square = g.detach().float() ** 2
    sums.weight = square if sums.weight is None else sums.weight + square
