"""What a recipe needs of the whole model before its first layer is packed: gradients at the layers, and ranks shared out over them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from effllm.errors import CalibrationError
from effllm.methods import LowRank, Method
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

    @staticmethod
    def solve(w: Tensor, own: Assigned, moments: Moments | None) -> Packed:
        """Pack w (N, K) with the moments of its inputs."""
        g = own.gradients
        seen = moments if g is None or moments is None else replace(moments, fisher=g.weight, outputs=g.outputs)
        return solve(w, own.params, seen)


@dataclass
class Prepared:
    """Parameters per module, modules that stay dense after all, and gradients."""

    params: dict[str, Method] = field(default_factory=dict)
    kept: list[Decision] = field(default_factory=list)
    gradients: dict[str, Gradients] = field(default_factory=dict)

    def assigned(self, name: str) -> Assigned:
        """What calibration hands to the solver of one module."""
        return Assigned(self.params[name], self.gradients.get(name))

    @property
    def aims(self) -> bool:
        """Whether calibration is to follow the dense model beside the packed one."""
        return any(p.aims_at_dense for p in self.params.values())


def prepare(model: nn.Module, covered: Covered, calibration: Any) -> Prepared:
    """Settle what rules leave open. `covered` are the modules that are to be packed; nothing is changed.

    Raises CalibrationError where a rule needs data that are not there, RecipeError for a ratio that cannot be reached.
    """
    done = Prepared({n: p for n, (_, p) in covered.items()})
    low: dict[str, tuple[nn.Module, LowRank]] = {n: (m, p) for n, (m, p) in covered.items() if isinstance(p, LowRank)}
    if not low:
        return done
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
    return done
