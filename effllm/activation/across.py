"""How much of a model's target each of its blocks takes: by what it costs the model's output when that block alone is sparse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from effllm.activation.calibration import Gate, Plan, Site
from effllm.activation.record import SINKS
from effllm.activation.settle import running
from effllm.solvers import blocks
from effllm.solvers.activation import across
from effllm.solvers.blocks import Batch

TOKENS = 512  # seen once per block
ONE_CHAIN = "the model's output is neither logits nor a tensor: all blocks have the same share"


@torch.no_grad()
def shares(model: nn.Module, uniform: Plan, sites: Mapping[str, Site], gates: Mapping[str, Gate], data: list[Batch]) -> dict[str, float]:
    """A share per module, the method's sparsity on average over the blocks' weights; none where it is 0 or outputs cannot be compared.

    uniform: the method's plan with one share everywhere.
    """
    parts = {
        f"{prefix}.{i}": [n for n in sites if n.startswith(f"{prefix}.{i}.")]
        for prefix, members in blocks.lists(model, sites).items()
        for i in range(len(members))
    }
    parts = {block: names for block, names in parts.items() if any(n in uniform.inputs or n in uniform.gates for n in names)}
    batches = blocks.first(data, TOKENS)
    dense = [_output(model, b) for b in batches]
    if uniform.method.sparsity == 0 or len(parts) < 2 or any(d is None for d in dense):
        return {}
    costs = {}
    for block, names in parts.items():
        inside = set(names)
        one = replace(uniform, inputs=_of(uniform.inputs, inside), gates=_of(uniform.gates, inside))
        with running(model, one, gates):
            costs[block] = sum(_apart(d, s) for d, b in zip(dense, batches, strict=True) if d is not None and (s := _output(model, b)) is not None)
    sizes = {block: sum(sites[n].shape[0] * sites[n].shape[1] for n in names) for block, names in parts.items()}
    found = across.shares(costs, sizes, uniform.method.sparsity)
    return {n: found[block] for block, names in parts.items() for n in names}


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
