"""`effllm.calibrate`: thresholds for activation sparsity, from a model's activations on text."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from effllm import compat
from effllm.activation import across, gates, projections
from effllm.activation.calibration import Calibration, Gate, Plan, Site, dense_weight, structure, weight_hash
from effllm.activation.record import Moment, Seen, histogram_of, through
from effllm.activation.settle import settle
from effllm.errors import CalibrationError, OptionError, RecipeError
from effllm.methods import Activation
from effllm.passes.roles import Roles
from effllm.recipe import Recipe
from effllm.solvers import blocks
from effllm.solvers.activation import Histogram, rsparse
from effllm.solvers.blocks import Batch

TOKENS = 16384  # tails of activations are not known from fewer
_LAYER = re.compile(r"(^|\.)\d+\.")
Methods = str | Activation | Iterable[str | Activation]
Progress = Callable[[str], None]


def calibrate(model: nn.Module, data: Any, methods: Methods = "chess(sparsity=0.5)", *, progress: Progress | None = None) -> Calibration:
    """Find thresholds at which a model's activations may be skipped.

    model: dense, or packed already (`effllm.compress(model, "w4")` first: thresholds hold for the weights they were found with).
    data: token windows, a LongTensor (windows, length), or an iterable of model inputs; at least 16384 tokens. The first 1 % of each
    window, where attention sinks are, is left out. methods: one or several of chess, rsparse, teal, cats with their parameters, as
    in a recipe: "teal(sparsity=0.5)". progress: called with a line per stage.
    Returns a Calibration: hand it to `compress(model, "act:...", calibration=...)`, or save it and read it with `Calibration.load`.
    Raises CalibrationError: E-CAL-SHORT (too few tokens), E-CAL-CONSTANT, E-CAL-NAN, E-CAL-GRAPH, E-CAL-NONE (nothing to make sparse).
    """
    if not isinstance(model, nn.Module):
        raise OptionError("E-OPT-MODEL", f"cannot calibrate a {type(model).__name__}", "pass an nn.Module")
    wanted = parse(methods)
    inputs = blocks.batches(data)
    tokens = sum(_tokens(b) for b in inputs)
    if tokens < TOKENS:
        raise CalibrationError("E-CAL-SHORT", f"{tokens} tokens; tails of activations need {TOKENS}", "give more windows of text")
    return Recording(model, inputs, tokens, wanted, progress or (lambda _: None)).solve(wanted)


def parse(methods: Methods) -> list[Activation]:
    """Methods from their words. Raises RecipeError."""
    given = [methods] if isinstance(methods, str | Activation) else list(methods)
    out: list[Activation] = []
    for m in given:
        made = m if isinstance(m, Activation) else Recipe.parse(m if m.startswith("act:") else f"act:{m}").act
        if made is None:
            raise RecipeError("E-RCP-METHOD", f"{m!r} names no activation method", f"one of {', '.join(Activation.names)}")
        made.check()
        if made not in out:
            out.append(made)
    if not out:
        raise RecipeError("E-RCP-EMPTY", "no method is named", "pass for example 'chess(sparsity=0.5)'")
    return out


def _tokens(batch: Batch) -> int:
    ids = batch if isinstance(batch, Tensor) else next((v for v in batch.values() if isinstance(v, Tensor) and not v.is_floating_point()), None)
    if ids is None:  # embeddings (..., hidden)
        value = next((v for v in batch.values() if isinstance(v, Tensor)), None) if not isinstance(batch, Tensor) else batch
        return 0 if value is None else value.numel() // value.shape[-1]
    return ids.numel()


class Recording:
    """What the passes over the data leave behind: enough for every parameter of the methods that were wanted."""

    def __init__(self, model: nn.Module, inputs: list[Batch], tokens: int, wanted: Sequence[Activation], tell: Progress) -> None:
        self.model, self.batches, self.tokens, self.tell = model, inputs, tokens, tell
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.roles: set[str] = set()  # of linears whose inputs are also counted times the norms of their columns
        if any(m.name == "chess" and m.attention and m.weigh for m in wanted):
            self.roles = {"q", "o"}
        self.weigh = any(m.name == "rsparse" for m in wanted)
        self.chess = sorted({m.weigh for m in wanted if m.name == "chess"})  # whether channels count by their column of the down projection
        self.graph = ""
        self.sites: dict[str, Site] = {}
        self.gates: dict[str, Gate] = {}
        self.inputs: dict[str, Histogram] = {}  # |x| by module
        self.weighted: dict[str, Histogram] = {}  # |x| times the norm of its column, by module
        self.acts: dict[str, Histogram] = {}  # |act(gate)| by down projection
        self.pooled: dict[bool, dict[str, Histogram]] = {weigh: {} for weigh in (False, True)}  # c |act(gate)| by down projection
        self.up: dict[str, Moment] = {}  # up projections by down projection
        self._costs: dict[tuple[float, int], dict[str, float]] = {}  # shares by measured costs, the same for all methods
        tell("recording activations")
        self.first()
        if self.chess:
            tell("recording pooled importance")
            self.second()

    def solve(self, wanted: Sequence[Activation]) -> Calibration:
        """A plan for each method."""
        found = Calibration(self.graph, structure(self.model), self.tokens, self.sites, self.gates, histograms=self.counts())
        for method in wanted:
            self.tell(f"solving {method.label}")
            even = self.even(method)
            if not even.inputs and not even.gates:
                why = "; ".join(f"{n}: {r}" for n, r in list(even.kept.items())[:2]) or "no linear in a list of layers was found"
                raise CalibrationError("E-CAL-NONE", f"{method.name} has nothing to make sparse: {why}", "try teal, or another model")
            shares = self.shares(method, even)
            plan = self.plan(method, shares)
            if method.compares and not shares:
                plan.kept.setdefault(next(iter(blocks.lists(self.model, self.sites)), ""), across.NOT_COMPARED)
            settle(self.model, plan, self.batches, self.gates, method.settle)
            found.plans.append(plan)
        return found

    def shares(self, method: Activation, even: Plan) -> dict[str, float]:
        """Shares of modules that do not get the method's sparsity, where something is measured."""
        if not method.compares:
            return {}
        if not method.gated and method.allocation == "measured":
            key = (method.sparsity, method.tokens)
            if key not in self._costs:
                self._costs[key] = across.projections(self.model, method, self.sites, self.inputs, self.batches)
            return self._costs[key]
        return across.shares(self.model, even, self.sites, self.gates, self.batches)

    def plan(self, method: Activation, shares: Mapping[str, float]) -> Plan:
        """A method's plan; shares: of modules that do not get its sparsity."""
        if not method.gated:
            return projections.solve(self.model, method, self.batches, self.sites, self.inputs, self.weighted, shares)
        scales = {down: self.scale(down, method.weigh) for down in self.up}
        pooled = self.pooled[method.weigh]
        return gates.solve(method, self.sites, self.gates, self.inputs, self.acts, self.weighted, pooled, scales, self.norms, shares)

    def even(self, method: Activation) -> Plan:
        """One share everywhere, and no low rank."""
        if method.gated:
            return self.plan(method, {})
        return projections.uniform(method, self.sites, self.inputs)

    def first(self) -> None:
        """Histograms of inputs and activated gates, second moments of up projections."""
        through(self.model, self.batches, self._first)

    def second(self) -> None:
        """Histograms of pooled importance."""
        through(self.model, self.batches, self._second)

    def counts(self) -> dict[str, Tensor]:
        """Histograms of |x|, each once, by the first module that reads it."""
        first = {id(h): k for k, h in reversed(self.inputs.items())}
        return {k: h.counts for k, h in self.inputs.items() if first[id(h)] == k}

    def _first(self, found: Roles) -> list[tuple[fx.Node, Seen]]:
        self.graph = self.graph or graph_hash(found)
        placed: list[tuple[fx.Node, Seen]] = []
        shared: dict[fx.Node, str] = {}
        for linear in found.linears.values():
            name = linear.module
            w = dense_weight(self.modules[name]) if name in self.modules and _LAYER.search(name) else None
            if w is None:
                continue
            if name not in self.sites:
                self.sites[name] = Site(found.of[name], (w.shape[0], w.shape[1]), weight_hash(w))
            leader = shared.setdefault(linear.x, name)
            if leader == name:
                placed.append((linear.x, histogram_of(self.inputs, name)))
            else:
                self.inputs[name] = self.inputs[leader]
            if self.weigh or self.sites[name].role in self.roles:
                placed.append((linear.x, histogram_of(self.weighted, name, rsparse.norms(w))))
        for g in found.gated:
            down = g.down.module
            if down in self.sites:
                self.gates[down] = Gate(self._function(g.act), g.gate.module, g.up.module, down, g.half)
                placed.append((g.act, histogram_of(self.acts, down)))
                if self.chess:
                    placed.append((g.up_value, self.up.setdefault(down, Moment()).add))
        return placed

    def _function(self, act: fx.Node) -> str:
        """The module that computes an activation function and nothing else."""
        name, _ = compat.module_of(act)
        module = self.modules.get(name)
        plain = module is not None and not any(True for _ in module.children()) and not any(True for _ in module.parameters())
        return name if plain else ""

    def _second(self, found: Roles) -> list[tuple[fx.Node, Seen]]:
        own = [(g.act, g.down.module) for g in found.gated if g.down.module in self.up]
        return [(act, histogram_of(self.pooled[weigh], down, self.scale(down, weigh))) for weigh in self.chess for act, down in own]

    def scale(self, down: str, weigh: bool) -> Tensor:
        """c_i of CHESS (N,) of a gated MLP, by its down projection."""
        return gates.scale(self.up[down], dense_weight(self.modules[down]) if weigh else None)

    def norms(self, name: str) -> Tensor:
        """Norms of the columns of a linear (K,)."""
        w = dense_weight(self.modules[name])
        assert w is not None
        return rsparse.norms(w)


def graph_hash(found: Roles) -> str:
    """A hash of the graph's operators and of the modules of its linears; sizes of inputs leave it alone."""
    nodes: Iterable[fx.Node] = next(iter(found.linears)).graph.nodes if found.linears else []
    text = "\n".join(f"{n.op} {_named(n)} {[m.name for m in n.all_input_nodes if m.op != 'placeholder']}" for n in nodes if n.op != "placeholder")
    text += "\n".join(f"{m} {r}" for m, r in found.of.items())
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _named(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


__all__ = ["TOKENS", "Calibration", "Recording", "calibrate", "graph_hash", "parse"]
