"""What calibration found: thresholds per module for one or several methods, and what they were found on.

Saved as calibration.json (sites, plans, hashes) and calibration.safetensors (thresholds, factors, histograms). Thresholds belong to one
graph and to one set of weights; `check` refuses any other and says what differs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effllm.errors import CalibrationError, nearest
from effllm.methods import Activation
from effllm.runtime.atomic import staged_directory
from effllm.runtime.dense import kind_of, matrix
from effllm.runtime.packed import PackedLinear

NAME, TENSORS, VERSION = "calibration.json", "calibration.safetensors", 1
_STALE = "calibrate again: effllm.calibrate(model, data, methods)"


@dataclass(frozen=True)
class Site:
    """A linear of the model: what it is for, its (N, K), the hash of its weight."""

    role: str
    shape: tuple[int, int]
    weight: str


@dataclass(frozen=True)
class Gate:
    """A gated MLP by its modules; `activation` is the module that computes the activation function, empty where a function does."""

    activation: str
    gate: str
    up: str
    down: str
    half: int | None = None  # of the one linear that gate and up are: which half is up


@dataclass
class Cut:
    """Thresholds of one site. `skipped`: the share of its weights that a token does not read; `realised`: the share of activations
    at or below the threshold on the calibration data. tensors: threshold, and norm, u, v of R-Sparse."""

    target: float
    realised: float
    skipped: float
    tensors: dict[str, Tensor]
    alpha: float = 1.0


@dataclass
class Plan:
    """One method at one target: cuts of inputs by module, and cuts of gates by the module of the down projection."""

    method: Activation
    inputs: dict[str, Cut] = field(default_factory=dict)
    gates: dict[str, Cut] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)  # module -> why it is not made sparse

    def table(self) -> list[dict[str, Any]]:
        """The allocation: a row per module."""
        rows = [("input", name, cut) for name, cut in self.inputs.items()] + [("gate", name, cut) for name, cut in self.gates.items()]
        return [{"module": n, "of": of, "target": c.target, "realised": c.realised, "skipped": c.skipped, "alpha": c.alpha} for of, n, c in rows]


@dataclass
class Calibration:
    """Plans for a model, and what they hold for."""

    graph: str  # hash of Dynamo's graph
    structure: str  # hash of module names, classes and configuration
    tokens: int
    sites: dict[str, Site]
    gates: dict[str, Gate]  # by the module of the down projection
    plans: list[Plan] = field(default_factory=list)
    histograms: dict[str, Tensor] = field(default_factory=dict)

    def plan(self, method: Activation) -> Plan:
        """The plan of a method with these parameters. CalibrationError (E-CAL-METHOD) where it was not calibrated."""
        for p in self.plans:
            if p.method == method:
                return p
        have = ", ".join(str(p.method.to_dict()) for p in self.plans) or "none"
        raise CalibrationError("E-CAL-METHOD", f"no thresholds for {method.to_dict()}; there are those of {have}", _STALE)

    def level(self, plan: Plan) -> float:
        """Share of the weights of all calibrated sites that a token does not read, by the calibration data."""
        skipped = {n: c.skipped for n, c in plan.inputs.items()}
        for down, cut in plan.gates.items():
            gate = self.gates[down]
            skipped[down] = cut.skipped
            skipped[gate.up] = cut.skipped / (1 if gate.half is None else 2)
        sizes = {n: s.shape[0] * s.shape[1] for n, s in self.sites.items()}
        return sum(skipped.get(n, 0.0) * size for n, size in sizes.items()) / max(1, sum(sizes.values()))

    def check(self, model: nn.Module) -> None:
        """Raise CalibrationError (E-CAL-STALE) where the model's modules or weights are not those that were calibrated."""
        modules = dict(model.named_modules(remove_duplicate=False))
        missing = [n for n in self.sites if n not in modules]
        if missing:
            raise CalibrationError("E-CAL-STALE", f"the calibration is of another model: {nearest(missing[0], modules)[:200]} has no {missing[0]}", _STALE)
        for name, site in self.sites.items():
            w = dense_weight(modules[name])
            if w is None or tuple(w.shape) != site.shape:
                found = type(modules[name]).__name__ if w is None else tuple(w.shape)
                raise CalibrationError("E-CAL-STALE", f"{name} is {found}, it was a linear of {site.shape} when calibrated", _STALE)
        if structure(model) != self.structure:
            cause = "modules, their classes or the model's configuration changed since calibration"
            raise CalibrationError("E-CAL-STALE", cause, _STALE)
        changed = [n for n, s in self.sites.items() if weight_hash(dense_weight(modules[n])) != s.weight]
        if changed:
            cause = f"{len(changed)} of {len(self.sites)} weights changed since calibration, first {changed[0]}"
            raise CalibrationError("E-CAL-STALE", cause, _STALE)

    def save(self, directory: str | Path) -> Path:
        """Write to a directory, whole or not at all. Raises CalibrationError (E-CAL-FILE)."""
        from safetensors.torch import save_file

        tensors = {f"histogram.{k}": t for k, t in self.histograms.items()}
        plans = []
        for i, p in enumerate(self.plans):
            about: dict[str, Any] = {"method": p.method.to_dict(), "kept": p.kept}
            for of in ("inputs", "gates"):
                cuts: dict[str, Cut] = getattr(p, of)
                about[of] = {n: {k: v for k, v in asdict_shallow(c).items() if k != "tensors"} for n, c in cuts.items()}
                tensors |= {f"{i}.{of}.{n}.{key}": t.contiguous() for n, c in cuts.items() for key, t in c.tensors.items()}
            plans.append(about)
        head = {
            "version": VERSION, "graph": self.graph, "structure": self.structure, "tokens": self.tokens, "sites": {n: asdict(s) for n, s in self.sites.items()},
            "gates": {n: asdict(g) for n, g in self.gates.items()}, "plans": plans,
        }  # fmt: skip
        try:
            with staged_directory(Path(directory).absolute()) as folder:
                save_file(tensors, folder / TENSORS)
                head["sha256"] = hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
                (folder / NAME).write_text(json.dumps(head, indent=1))
        except OSError as error:
            raise CalibrationError("E-CAL-FILE", f"cannot write to {directory}: {error}", "give a directory that can be written") from error
        return Path(directory)

    @staticmethod
    def load(directory: str | Path) -> Calibration:
        """Read what `save` wrote. Raises CalibrationError (E-CAL-FILE)."""
        from safetensors.torch import load_file

        folder = Path(directory)
        try:
            head = json.loads((folder / NAME).read_text())
            if head["version"] > VERSION:
                raise CalibrationError("E-CAL-FILE", f"the calibration has version {head['version']}, this effllm reads {VERSION}", "install a newer effllm")
            if hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest() != head["sha256"]:
                raise CalibrationError("E-CAL-FILE", f"{folder / TENSORS} is not the file that {NAME} describes", _STALE)
            return _read(head, load_file(folder / TENSORS))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CalibrationError("E-CAL-FILE", f"{folder} holds no calibration: {error!r}", "give a directory that Calibration.save wrote") from error


def _read(head: dict[str, Any], tensors: Mapping[str, Tensor]) -> Calibration:
    sites = {n: Site(s["role"], (s["shape"][0], s["shape"][1]), s["weight"]) for n, s in head["sites"].items()}
    found = Calibration(head["graph"], head["structure"], head["tokens"], sites, {n: Gate(**g) for n, g in head["gates"].items()})
    for i, about in enumerate(head["plans"]):
        plan = Plan(Activation.from_dict(about["method"]), kept=dict(about["kept"]))
        for of in ("inputs", "gates"):
            for n, values in about[of].items():
                prefix = f"{i}.{of}.{n}."
                own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
                getattr(plan, of)[n] = Cut(**values, tensors=own)
        found.plans.append(plan)
    found.histograms = {key.removeprefix("histogram."): t for key, t in tensors.items() if key.startswith("histogram.")}
    return found


def asdict_shallow(cut: Cut) -> dict[str, Any]:
    """The fields without copies of tensors."""
    return {key: getattr(cut, key) for key in Cut.__dataclass_fields__}


def dense_weight(module: nn.Module) -> Tensor | None:
    """The (N, K) value of a linear's weight, dense or packed; None for other modules."""
    if isinstance(module, PackedLinear):
        return module.weight.dense()
    return matrix(module).detach() if kind_of(module) == "linear" else None


def structure(model: nn.Module) -> str:
    """A hash of the names and classes of all modules, and of the configuration where there is one."""
    names = [f"{n} {type(m).__module__}.{type(m).__qualname__}" for n, m in model.named_modules(remove_duplicate=False)]
    config: Any = getattr(model, "config", None)
    about = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    volatile = ("dtype", "torch_dtype", "_name_or_path", "transformers_version", "use_cache")
    text = json.dumps({k: v for k, v in about.items() if k not in volatile and not k.startswith("_")}, sort_keys=True, default=str)
    return hashlib.sha256("\n".join([*names, text]).encode()).hexdigest()[:32]


def weight_hash(w: Tensor | None) -> str:
    """A hash of dtype, shape and values."""
    if w is None:
        return ""
    digest = hashlib.sha256(f"{w.dtype} {tuple(w.shape)}".encode())
    digest.update(w.contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
