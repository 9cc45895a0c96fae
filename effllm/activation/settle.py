"""Thresholds for activations as the sparse model has them.

Quantiles of the dense model's activations drop too much once all layers skip at once: activations further down shrink, and more of them
fall below a threshold. So the model runs with its thresholds on, and each of them is moved to the quantile of what it sees then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from effllm.activation.calibration import Cut, Gate, Plan
from effllm.activation.record import SINKS
from effllm.solvers import blocks
from effllm.solvers.activation import Histogram
from effllm.solvers.blocks import Batch

TOKENS = 4096  # of the last windows, seen once per round
Handles = list[Any]


@torch.no_grad()
def settle(model: nn.Module, plan: Plan, data: list[Batch], gates: Mapping[str, Gate], rounds: int) -> None:
    """Move the thresholds of a plan, in place, until each drops of the sparse model's activations the share it was to drop of the dense one's.

    Only sizes of thresholds change: which channels weigh how much, low ranks and shares stay. `rounds` passes over 4096 tokens, the first 1 % of each
    window left out; thresholds that drop nothing (-1), or exact zeros only (0), stay where they are.
    """
    batches = blocks.first(list(reversed(data)), TOKENS)
    for _ in range(rounds if plan.method.sparsity > 0 else 0):
        with running(model, plan, gates) as moves:
            for batch in batches:
                blocks.run(model, batch)
        for move in moves:
            move()


@contextmanager
def running(model: nn.Module, plan: Plan, gates: Mapping[str, Gate]) -> Iterator[list[Callable[[], None]]]:
    """Make a model sparse as a plan says, in every call and by hooks, without its kernels. What is dropped is counted; each of the functions that this
    yields moves a site's thresholds in the plan to where the count so far puts them."""
    modules, evaluating = dict(model.named_modules(remove_duplicate=False)), model.training
    handles: Handles = []
    moves = [_input(handles, modules[n], c) for n, c in plan.inputs.items()]
    moves += [_gate(handles, modules[gates[n].activation], c) for n, c in plan.gates.items() if gates[n].activation]
    model.eval()
    try:
        yield moves
    finally:
        model.train(evaluating)
        for handle in handles:
            handle.remove()


def _input(handles: Handles, module: nn.Module, cut: Cut) -> Callable[[], None]:
    """Make a linear sparse by its input."""
    t, rest, see, move = cut.tensors, list[Tensor](), *_site(cut)

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        kept = see(x, x.abs().float() * t["norm"].to(x.device) if "norm" in t else x.abs().float())
        if "u" in t:
            rest.append(x - kept)
        return (kept, *args[1:])

    def after(_: nn.Module, __: Any, y: Tensor) -> Tensor:
        x = rest.pop()
        return y + (x @ t["v"].to(x).t()) @ t["u"].to(x).t()

    handles.append(module.register_forward_pre_hook(before))
    if "u" in t:
        handles.append(module.register_forward_hook(after))
    return move


def _gate(handles: Handles, module: nn.Module, cut: Cut) -> Callable[[], None]:
    """Make an activation function's results sparse."""
    see, move = _site(cut)
    handles.append(module.register_forward_hook(lambda _, __, y: see(y, y.abs().float())))
    return move


def _site(cut: Cut) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[], None]]:
    """A function (x, sizes) that drops and counts, and one that moves the thresholds to where the count puts them."""
    t, seen = cut.tensors["threshold"], Histogram()
    usable = bool((t > 0).any()) and 0 < cut.realised < 1

    def see(x: Tensor, size: Tensor) -> Tensor:
        at = t.to(x.device)
        if usable:  # in units of the threshold; a channel that is always dropped counts as zero
            seen.add((size / at)[..., math.ceil(SINKS * size.shape[-2]) if size.dim() > 2 else 0 :, :])
        return torch.where(size <= at, 0.0, x).to(x.dtype)

    def move() -> None:
        if not usable or not seen.total:
            return
        factor = seen.quantile(cut.realised)
        if factor > 0:
            cut.tensors["threshold"] = t * factor  # `realised` stays: it is the share that this quantile is of

    return see, move
