"""Puts the thresholds of a plan into a model, next to its weights; and tells what was done to each module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from effllm.activation.across import NOT_COMPARED
from effllm.activation.calibration import Calibration, Cut, Plan
from effllm.activation.gates import FUSED
from effllm.autotune import skip_gain
from effllm.report import Decision, PassReport
from effllm.runtime import weights
from effllm.runtime.activated import ThresholdedActivation
from effllm.runtime.dense import kind_of, matrix
from effllm.runtime.formats import bipolar, dense, parts, thresholded
from effllm.runtime.formats.base import Packed
from effllm.runtime.packed import PackedLinear
from effllm.runtime.weights.thresholded import ThresholdedWeight

EVERY_ROW = -1
LEAST = 0.95  # of the dense linear's speed, predicted at one row: a linear that would fall below stays dense
NEUTRAL = Decision("", "", "kept", "neutral", "no activation is to be skipped: sparsity or rows is 0")


class Swap:
    """Puts modules into a model and can take all of them out again."""

    def __init__(self, model: nn.Module, anyway: bool = False) -> None:
        self.model, self.anyway = model, anyway
        self._undo: list[tuple[nn.Module, str, nn.Module]] = []

    def put(self, name: str, new: nn.Module) -> None:
        """Replace a module wherever it sits."""
        old = self.model.get_submodule(name)
        new.train(old.training)
        for parent in list(self.model.modules()):
            for leaf, child in list(parent._modules.items()):
                if child is old and parent is not new:
                    self._undo.append((parent, leaf, old))
                    setattr(parent, leaf, new)

    def sparse(self, name: str, packed: Packed, reason: str) -> Decision:
        """Put in the linear with thresholds, unless it is predicted to be slower than the dense one."""
        module = self.model.get_submodule(name)
        dtype = module.weight.dtype
        assert isinstance(dtype, torch.dtype)
        device = next(iter(packed.tensors.values())).device.type
        gain = skip_gain.gain(ThresholdedWeight.problem(packed, act="a16", dtype=dtype, device=device, m=1))
        before, after = (gain.dense, gain.sparse) if gain.kernel else (None, None)
        if gain.kernel and gain.speedup < LEAST and not self.anyway:
            why = f"predicted {1 / gain.speedup:.2f}x the time of the dense linear at one row"
            return Decision(name, name, "kept", "slower", why, time_before=before, time_after=after, kernel=gain.kernel)
        made = _make(module, packed)
        self.put(name, made)
        w = made.weight
        assert isinstance(w, ThresholdedWeight)
        size = parts.part(packed, "weight").nbytes
        return Decision(name, name, "applied", "sparse", f"{reason}; {w.why}", size, w.nbytes, before, after, kernel=w.kernel, config=w.config)

    def rollback(self) -> None:
        """Restore every module."""
        while self._undo:
            parent, leaf, old = self._undo.pop()
            setattr(parent, leaf, old)


def install(model: nn.Module, found: Calibration, plan: Plan, *, anyway: bool = False) -> tuple[PassReport, Swap]:
    """Make a model sparse as a plan says, in place. The swap that is returned takes it back.

    anyway: also where this machine's cost model says that a linear becomes slower, so that quality does not depend on the machine.
    Raises CalibrationError (E-CAL-STALE) where the thresholds belong to another model.
    """
    found.check(model)
    report, swap = PassReport("activation_sparsity"), Swap(model, anyway)
    if plan.method.sparsity == 0 or plan.method.rows == 0:
        report.decisions.append(NEUTRAL)
        return report, swap
    try:
        for name, cut in plan.inputs.items():
            report.decisions.append(_input(swap, name, cut, plan))
        for down, cut in plan.gates.items():
            report.decisions += _gate(swap, found, down, cut, plan)
        report.decisions += [Decision(n, n, "kept", _code(why), why) for n, why in plan.kept.items()]
        covered = {*plan.inputs, *plan.gates, *plan.kept, *(found.gates[d].up for d in plan.gates)}
        why = f"{plan.method.name} leaves it alone"
        report.decisions += [Decision(n, n, "kept", "role", f"{why}: role {s.role}") for n, s in found.sites.items() if n not in covered]
    except BaseException:
        swap.rollback()
        raise
    return report, swap


def _code(why: str) -> str:
    return "not-measured" if why == NOT_COMPARED else "fused-qkv" if why == FUSED else "uniform"


def _stored(module: nn.Module) -> Packed | str:
    """A linear's weight as a part of a thresholded one, or why it cannot be."""
    if isinstance(module, PackedLinear):
        held = module.weight
        if held.format != bipolar.name:
            return f"its weight is stored as {held.format!r}, whose columns cannot be skipped one by one"
        return held.packed()
    w = matrix(module).detach()
    return dense.make(w) if w.dtype in dense.DTYPES else f"its weight is {w.dtype}"


def _make(module: nn.Module, packed: Packed) -> PackedLinear:
    dtype = module.weight.dtype
    assert isinstance(dtype, torch.dtype)
    bias = module.bias
    made = PackedLinear(weights.make(packed, dtype=dtype), bias if isinstance(bias, Tensor) else None)
    made.requires_grad_(False)
    return made


def _input(swap: Swap, name: str, cut: Cut, plan: Plan) -> Decision:
    module = swap.model.get_submodule(name)
    stored = _stored(module)
    if isinstance(stored, str):
        return Decision(name, name, "kept", "format", stored)
    t = dict(cut.tensors)
    coded = stored.format == bipolar.name
    if "norm" in t and ("u" not in t or coded):  # |x| norm > t is |x| > t / norm; an input whose column is zero is always skipped
        norm = t.pop("norm")
        t["threshold"] = torch.where(norm > 0, t["threshold"] / norm.clamp_min(1e-38), torch.inf) if float(t["threshold"]) >= 0 else t["threshold"]
    if "u" in t:
        dtype = next(iter(stored.tensors.values())).dtype if not coded else _like(module)
        t["u"], t["v"] = t["u"].to(dtype), t["v"].to(dtype)
    device = next(iter(stored.tensors.values())).device
    t = {"colnorm" if key == "norm" else key: x.to(device) for key, x in t.items()}
    about: dict[str, Any] = {"limit": plan.method.rows, "method": plan.method.name, "target": cut.target, "realised": cut.realised}
    packed = thresholded.make(stored, t.pop("threshold"), colnorm=t.get("colnorm"), u=t.get("u"), v=t.get("v"), **about)
    return swap.sparse(name, packed, f"{cut.realised:.1%} of its inputs skipped, {cut.skipped:.1%} of its weight not read")


def _like(module: nn.Module) -> torch.dtype:
    found = module.weight.dtype
    assert isinstance(found, torch.dtype)
    return found if found in dense.DTYPES else torch.float32


def _gate(swap: Swap, found: Calibration, down: str, cut: Cut, plan: Plan) -> list[Decision]:
    """The activation with thresholds, the down projection by input channel, a coded up projection by row."""
    gate, method = found.gates[down], plan.method
    if not gate.activation:
        return [Decision(down, down, "kept", "activation", "its activation function is no module of its own, which thresholds could go into")]
    inner = swap.model.get_submodule(gate.activation)
    t = cut.tensors["threshold"].to(next(iter(swap.model.get_submodule(down).parameters()), torch.empty(0)).device)
    swap.put(gate.activation, ThresholdedActivation(inner, t, method.rows, method=method.name, target=cut.target, realised=cut.realised))
    about: dict[str, Any] = {"limit": method.rows, "method": method.name, "target": cut.target, "realised": cut.realised}
    out = [Decision(gate.activation, gate.activation, "applied", "gate", f"{cut.realised:.1%} of its channels are dropped")]
    module = swap.model.get_submodule(down)
    stored = _stored(module)
    if isinstance(stored, str):
        out.append(Decision(down, down, "kept", "format", stored))
    else:
        packed = thresholded.make(stored, torch.zeros(1, device=t.device), **about)
        out.append(swap.sparse(down, packed, f"skips the {cut.realised:.1%} of its inputs that the gate made zero"))
    return out + _up(swap, gate.up, gate.half, about)


def _up(swap: Swap, name: str, half: int | None, about: dict[str, Any]) -> list[Decision]:
    module = swap.model.get_submodule(name)
    if half is not None:
        coded = isinstance(module, PackedLinear)
        why = "gate and up are one packed matrix" if coded else "gate and up are one matrix: rows of its up half are skipped in a compiled graph"
        return [Decision(name, name, "kept", "fused-up", why)]
    stored = _stored(module)
    if isinstance(stored, str):
        return [Decision(name, name, "kept", "format", stored)]
    if kind_of(module):  # a dense weight is by row as it is
        return [Decision(name, name, "kept", "up", "its rows are skipped where a compiled graph shows the gate")]
    return [swap.sparse(name, thresholded.make(stored, None, side="out", **about), "rows are skipped where a compiled graph shows the gate")]


def sparse_parts(model: nn.Module) -> list[ThresholdedWeight | ThresholdedActivation]:
    """Everything in a model that has thresholds."""
    return [m for m in model.modules() if isinstance(m, ThresholdedWeight | ThresholdedActivation)]


@contextmanager
def every_row(model: nn.Module) -> Iterator[None]:
    """Skip in every call, prompts included, for as long as the context lasts: how quality is measured on text."""
    before: list[tuple[ThresholdedWeight | ThresholdedActivation, int]] = []
    for part in sparse_parts(model):
        if isinstance(part, ThresholdedActivation):
            before.append((part, part.limit))
            part.limit = EVERY_ROW
        else:
            before.append((part, int(part.attrs["limit"])))
            part.limited(EVERY_ROW)
    try:
        yield
    finally:
        for part, limit in before:
            if isinstance(part, ThresholdedActivation):
                part.limit = limit
            else:
                part.limited(limit)
