"""Reorder channels of a dense model before N:M masks are chosen, so that groups of M hold N weights worth keeping more often.

Channels flow from the rows of one weight to the columns of others; the graph of coupled dimensions says which have to move together, so the
model computes what it did. "inner" moves only dimensions that live inside one block of the model (an MLP's hidden units, the value channels
of each KV head): states between blocks stay in place, and a block can still be compared with the dense model's. "all" moves the residual
stream as well, one order for every linear that reads it.

What counts is the expected squared error of a linear's outputs, were inputs independent: (w_ij rms(x_j))^2 over what a mask drops, each
linear's total brought to its number of weights so that none outweighs the others by its scale.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from effllm.coupling import CoupledGraph, Dimension, inverse, nm_order, permute
from effllm.errors import CouplingError
from effllm.methods import NM
from effllm.report import Decision
from effllm.runtime import dense
from effllm.solvers import blocks

BUDGET_S = 60.0  # of one dimension's search; one that it ends says so
_EXAMPLE = 16  # tokens that the graph is traced with
_ESCAPES = 2


@dataclass
class Reordered:
    """What moved: one Decision per dimension that was looked at, and the way back."""

    model: nn.Module
    decisions: list[Decision] = field(default_factory=list)
    moved: list[tuple[Dimension, Tensor]] = field(default_factory=list)

    def undo(self) -> None:
        """Every channel to its old place, bit for bit."""
        while self.moved:
            dimension, permutation = self.moved.pop()
            permute(self.model, dimension, inverse(permutation))


def reorder(model: nn.Module, covered: Mapping[str, tuple[nn.Module, NM]], calibration: Any, *, budget_s: float = BUDGET_S) -> Reordered:
    """Permute a model in place where the N:M patterns of `covered` (module name -> Linear or Conv1D, parameters with `permute`) keep more.

    calibration: token windows or model inputs, as for `compress`. A model that cannot be traced, and a dimension in which nothing can be
    gained, is a Decision; after an error the model is as it was. Raises CalibrationError for data of another form.
    """
    done = Reordered(model)
    batches = blocks.batches(calibration)
    try:
        inputs, output = _example(model, batches[0])
        graph = CoupledGraph.of(model, inputs, output=output)
    except CouplingError as error:
        done.decisions.append(Decision("permute", "", "kept", error.code, f"no channel was moved: {error.cause}"))
        return done
    names = {graph.aliases.get(f"{n}.weight", f"{n}.weight"): n for n in covered}
    inside = [f"{prefix}.{i}." for prefix, members in blocks.lists(model, covered).items() for i in range(len(members))]
    chosen = [d for d in graph.dimensions if _wanted(d, {p: covered[n][1] for p, n in names.items()}, inside)]
    scores = _scores(model, {p: covered[n][0] for p, n in names.items() if any(p == m.parameter for d in chosen for m in d.consumers)}, batches)
    try:
        for dimension in chosen:
            own = {m.parameter: covered[names[m.parameter]][1] for m in dimension.consumers if m.parameter in names}
            _move(done, dimension, own, scores, budget_s)
    except BaseException:
        done.undo()
        raise
    return done


def _wanted(dimension: Dimension, rules: Mapping[str, NM], inside: list[str]) -> bool:
    """Whether a rule asks for this dimension and a permutation of it can refill groups."""
    modes = {rules[m.parameter].permute for m in dimension.consumers if m.parameter in rules} - {"none"}
    if not modes or dimension.pinned or dimension.volatile or dimension.structure.unit > 1:
        return False
    local = any(all(m.parameter.startswith(prefix) for m in dimension.members) for prefix in inside)
    return local or "all" in modes


def _move(done: Reordered, dimension: Dimension, rules: Mapping[str, NM], scores: Mapping[str, Tensor], budget_s: float) -> None:
    patterns: dict[tuple[int, int], int] = {}
    for parameter, rule in rules.items():
        key = (rule.keep, rule.of_group)
        patterns[key] = patterns.get(key, 0) + scores[parameter].numel()
    n, m = max(patterns, key=lambda key: patterns[key])  # where rules differ, the pattern of most weights
    where = ", ".join(f"{x.parameter}[{x.axis}]" for x in dimension.members[:3]) + (", ..." if len(dimension.members) > 3 else "")
    site = f"permute {dimension.index}"
    if dimension.size % m:
        done.decisions.append(Decision(site, "", "kept", "pattern", f"groups of {m} do not fill the {dimension.size} channels of {where}"))
        return
    try:
        found = nm_order(dimension, {p: scores[p] for p in rules}, n, m, budget_s=budget_s, escapes=_ESCAPES)
    except CouplingError as error:
        done.decisions.append(Decision(site, "", "kept", error.code, f"{where}: {error.cause}"))
        return
    energy = f"of {where}: {n}:{m} keeps {found.before:.2%} of the energy"
    if not found.gain > 0:
        done.decisions.append(Decision(site, "", "kept", "no-gain", f"{energy}, and no order was found that keeps more"))
        return
    permute(done.model, dimension, found.permutation)
    done.moved.append((dimension, found.permutation))
    reason = f"{energy}, reordered {found.after:.2%}"
    config = {"channels": dimension.size, "before": found.before, "after": found.after, "swaps": found.swaps, "stopped": found.stopped}
    done.decisions.append(Decision(site, "", "applied", "permuted", reason, config=config))


@torch.no_grad()
def _scores(model: nn.Module, modules: Mapping[str, nn.Module], batches: list[blocks.Batch]) -> dict[str, Tensor]:
    """Expected squared error per weight, in the parameter's own shape, at mean 1; inputs that calibration never reached count as alike."""
    squares: dict[str, Tensor] = {}

    def see(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().flatten(0, -2).float().square().sum(0)
            squares[name] = squares[name] + x if name in squares else x

        return hook

    handles = [module.register_forward_pre_hook(see(name)) for name, module in modules.items()]
    training = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        for batch in batches:
            blocks.run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, was in training:
            module.training = was
    found = {}
    for name, module in modules.items():
        w = dense.matrix(module).detach().float()
        score = w.square() * squares.get(name, torch.ones(w.shape[1], device=w.device))
        score = score / score.mean().clamp_min(torch.finfo(torch.float32).tiny)
        found[name] = score.t() if dense.is_transposed(module) else score
    return found


def _example(model: nn.Module, batch: blocks.Batch) -> tuple[Any, str | None]:
    """A short input of the calibration's form for the trace, and the field of the output that stands for it where it has several."""
    extra: dict[str, Any] = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    if not isinstance(batch, Tensor):
        inputs: Any = extra | {k: v for k, v in batch.items() if k != "labels"}
    else:
        inputs = {"input_ids": batch[:1, :_EXAMPLE], **extra} if extra else (batch[:1, :_EXAMPLE],)
    with torch.no_grad():
        result = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return inputs, "logits" if hasattr(result, "logits") else None
