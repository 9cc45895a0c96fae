"""What a recipe needs of the whole model before its first layer is packed: gradients at the layers, ranks or patterns shared out over
them, channels in a better order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from effllm.errors import CalibrationError
from effllm.methods import NM, LowRank, Method
from effllm.reordering import reorder
from effllm.report import Decision
from effllm.runtime.formats.base import Packed
from effllm.solvers import solve
from effllm.solvers.lowrank.gradients import Gradients
from effllm.solvers.moments import Moments

Covered = dict[str, tuple[nn.Module, Method]]


@dataclass(frozen=True)
class Assigned:
    """One module's parameters with the gradients that its solver reads; stands for the parameters during calibration."""

    params: Method
    gradients: Gradients | None = None

    @property
    def requires_calibration(self) -> bool:
        """As the parameters say."""
        return self.params.requires_calibration

    @property
    def reads_dense(self) -> bool:
        """As the parameters say."""
        return self.params.reads_dense

    @staticmethod
    def solve(w: Tensor, own: Assigned, moments: Moments | None) -> Packed:
        """Pack w (N, K) with the moments of its inputs."""
        g = own.gradients
        seen = moments if g is None or moments is None else replace(moments, fisher=g.weight, outputs=g.outputs)
        return solve(w, own.params, seen)


@dataclass
class Prepared:
    """Parameters per module, modules that stay dense after all, other decisions, gradients, and how to undo what was done to the model."""

    params: dict[str, Method] = field(default_factory=dict)
    kept: list[Decision] = field(default_factory=list)
    also: list[Decision] = field(default_factory=list)
    undo: Callable[[], None] = lambda: None
    gradients: dict[str, Gradients] = field(default_factory=dict)

    def assigned(self, name: str) -> Assigned:
        """What calibration hands to the solver of one module."""
        return Assigned(self.params[name], self.gradients.get(name))

    @property
    def aims(self) -> bool:
        """Whether calibration is to follow the dense model beside the packed one."""
        return any(p.aims_at_dense for p in self.params.values())


def prepare(model: nn.Module, covered: Covered, calibration: Any) -> Prepared:
    """Settle what rules leave open. `covered` are the modules that are to be packed; only channels are moved, and only where a rule says so.

    Raises CalibrationError where a rule needs data that are not there, RecipeError for a ratio that cannot be reached.
    """
    done = Prepared({n: p for n, (_, p) in covered.items()})
    low: dict[str, tuple[nn.Module, LowRank]] = {n: (m, p) for n, (m, p) in covered.items() if isinstance(p, LowRank)}
    sparse: dict[str, tuple[nn.Module, NM]] = {n: (m, p) for n, (m, p) in covered.items() if isinstance(p, NM) and p.needs_model}
    if low:
        _lowrank(model, low, calibration, done)
    if sparse:
        _sparse(model, sparse, calibration, done)
    return done


def _lowrank(model: nn.Module, low: dict[str, tuple[nn.Module, LowRank]], calibration: Any, done: Prepared) -> None:
    """Gradients and ranks."""
    from effllm.solvers.lowrank import prepare as lowrank

    if calibration is None:
        for name, (_, p) in low.items():
            if p.requires_calibration:
                step = "pass calibration=, or choose a data-free method: svd, monarch(solver=project), nm(solver=magnitude)"
                raise CalibrationError("E-CAL-NONE", f"{name}: the recipe asks for {p.label}, which needs calibration data", step)
    else:
        done.gradients = lowrank.collect(model, calibration, low)
    rules = dict.fromkeys(p for _, p in low.values() if p.shared != "uniform")
    for rule in rules:
        own = {n: mp for n, mp in low.items() if mp[1] == rule}
        given, dense = lowrank.allocated(model, calibration, own, done.gradients)
        done.params |= given
        for name, reason in dense.items():
            del done.params[name]
            done.kept.append(Decision(name, name, "kept", "break-even", reason))


def _sparse(model: nn.Module, sparse: dict[str, tuple[nn.Module, NM]], calibration: Any, done: Prepared) -> None:
    """Patterns per block, then the order of channels that suits them."""
    from effllm.solvers.nm import layerwise

    if calibration is None:
        for name, (_, p) in sparse.items():
            if p.requires_calibration:
                step = "pass calibration=, or leave permute=, ratios=knee and such solvers out: nm(solver=magnitude)"
                raise CalibrationError("E-CAL-NONE", f"{name}: the recipe asks for {p.label}, which needs calibration data", step)
    for rule in dict.fromkeys(p for _, p in sparse.values() if p.ratios != "uniform"):
        own = {n: m for n, (m, p) in sparse.items() if p == rule}
        found, note = layerwise.per_module(model, own, rule.keep, rule.of_group, rule.ratios, calibration)
        done.also.append(Decision(f"ratios {rule.pattern}", "", "applied", "ratios", note))
        for name, n in found.items():
            if n == rule.of_group:
                del done.params[name], sparse[name]
                done.kept.append(Decision(name, name, "kept", "dense-ratio", f"ratios={rule.ratios} takes nothing from its block"))
            else:
                own_rule = replace(rule, pattern=f"{n}:{rule.of_group}", ratios="uniform")
                done.params[name], sparse[name] = own_rule, (own[name], own_rule)
    moving = {n: mp for n, mp in sparse.items() if mp[1].permute != "none"}
    if moving:
        moved = reorder(model, moving, calibration)
        done.undo = moved.undo
        done.also += moved.decisions
        for name, (_, p) in moving.items():
            done.params[name] = replace(p, permute="none")
