"""How much of a model's target each of its blocks takes: by what it costs the model's output when that block alone is sparse.

Where gates decide (CHESS), the gated MLP of a block and the inputs of its attention are two parts with a share each: a share of one skips other
weights than a share of the other, at another cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from effllm.activation.calibration import Gate, Plan, Site
from effllm.activation.gates import cut
from effllm.activation.record import SINKS
from effllm.activation.settle import running
from effllm.methods import Activation
from effllm.solvers import blocks
from effllm.solvers.activation import Histogram, across, measured
from effllm.solvers.blocks import Batch

TOKENS = 512  # seen once per block
NOT_COMPARED = "the model's output is neither logits nor a tensor: nothing was measured by it"


@torch.no_grad()
def shares(model: nn.Module, uniform: Plan, sites: Mapping[str, Site], gates: Mapping[str, Gate], data: list[Batch]) -> dict[str, float]:
    """A share per module, the method's sparsity on average over the weights that may be skipped; none where it is 0 or outputs cannot be compared.

    uniform: the method's plan with one share everywhere.
    """
    parts: dict[str, list[str]] = {}
    for prefix, members in blocks.lists(model, sites).items():
        for i in range(len(members)):
            for kind, cuts in (("gates", uniform.gates), ("inputs", uniform.inputs)):
                if names := [n for n in sites if n.startswith(f"{prefix}.{i}.") and n in cuts]:
                    parts[f"{prefix}.{i} {kind}"] = names
    batches = blocks.first(data, TOKENS)
    dense = [_output(model, b) for b in batches]
    if uniform.method.sparsity == 0 or len(parts) < 2 or any(d is None for d in dense):
        return {}
    costs = {}
    for part, names in parts.items():
        inside = set(names)
        one = replace(uniform, inputs=_of(uniform.inputs, inside), gates=_of(uniform.gates, inside))
        with running(model, one, gates):
            costs[part] = sum(_apart(d, s) for d, b in zip(dense, batches, strict=True) if d is not None and (s := _output(model, b)) is not None)
    sizes = {part: sum(_weights(n, uniform, sites, gates) for n in names) for part, names in parts.items()}
    found = across.shares(costs, sizes, uniform.method.sparsity)
    return {n: found[part] for part, names in parts.items() for n in names}


@torch.no_grad()
def projections(model: nn.Module, method: Activation, sites: Mapping[str, Site], inputs: Mapping[str, Histogram], data: list[Batch]) -> dict[str, float]:
    """A share per linear by what it alone costs the model's output, and how that grows for all of its kind; none as with `shares`.

    Takes a pass over `method.tokens` tokens for each linear, and three for each kind.
    """
    names = [n for prefix, members in blocks.lists(model, sites).items() for n in sites if n.startswith(f"{prefix}.") and len(members)]
    batches = blocks.first(data, method.tokens)
    dense = [_output(model, b) for b in batches]
    if method.sparsity == 0 or len(names) < 2 or any(d is None for d in dense):
        return {}

    def cost(chosen: list[str], share: float) -> float:
        with running(model, Plan(method, {n: cut(inputs[n], share, n) for n in chosen}), {}):
            return sum(_apart(d, s) for d, b in zip(dense, batches, strict=True) if d is not None and (s := _output(model, b)) is not None)

    kinds: dict[str, list[str]] = {}
    for n in names:
        kinds.setdefault(sites[n].role or n.rsplit(".", 1)[-1], []).append(n)
    levels = sorted({method.sparsity / 2, method.sparsity, (1 + method.sparsity) / 2})
    curves: dict[str, list[float]] = {}
    for members_ in kinds.values():
        curve = measured.growth(levels, [cost(members_, s) for s in levels], method.sparsity)
        curves |= dict.fromkeys(members_, curve)
    alone = {n: cost([n], method.sparsity) for n in names}
    return measured.shares(alone, curves, {n: math.prod(sites[n].shape) for n in names}, method.sparsity)


def _weights(name: str, plan: Plan, sites: Mapping[str, Site], gates: Mapping[str, Gate]) -> int:
    """Weights that a share of 1 skips: a gate's channels are rows of the up and columns of the down projection."""
    own = math.prod(sites[name].shape)
    gate = gates.get(name) if name in plan.gates else None
    if gate is None or gate.up not in sites:
        return own
    return own + math.prod(sites[gate.up].shape) // (1 if gate.half is None else 2)


def _of(cuts: Mapping[str, Any], inside: set[str]) -> dict[str, Any]:
    return {n: c for n, c in cuts.items() if n in inside}


def _output(model: nn.Module, batch: Batch) -> Tensor | None:
    """Logits, or the tensor that the model gives, as log-probabilities or as it is; sinks left out."""
    found: list[Any] = []
    blocks.run(model, batch, lambda *a, **k: found.append(model(*a, **k)))
    out = found[0] if found else None
    logits = getattr(out, "logits", None)
    if isinstance(logits, Tensor):
        return _late(logits.float()).log_softmax(-1)
    return _late(out.float()) if isinstance(out, Tensor) else None


def _late(y: Tensor) -> Tensor:
    return y[..., int(SINKS * y.shape[-2]) + 1 :, :] if y.dim() > 1 and y.shape[-2] > 1 else y


def _apart(a: Tensor, b: Tensor) -> float:
    """KL(a || b) of log-probabilities, the squared difference of anything else."""
    if bool((a <= 0).all()):
        return float((a.exp() * (a - b)).sum(-1).double().mean())
    return float((a - b).double().square().sum())
