"""The torch.compile backend: copy the graph, rewrite it by the recipe, bind packed weights, hand the rest to Inductor.

    torch.compile(model, backend="effllm", options={"recipe": "w4"})

Options: recipe (any form that Recipe.parse takes; default "w8"), weights ("checked" or "frozen"), strict (raise where a rule
applied to nothing), kernel (force a provider by name), inner ("inductor", or "eager" to run the rewritten graph uncompiled),
mode (one of Inductor's modes), inductor (dict of Inductor's options), layers ("once": compile isomorphic layers once, about
half the compile time; "inline": every layer by itself, a few percent faster to run; "auto": once on CPU), autotune (a budget such
as "30s": the kernels of the graph are tuned for at most that long before it is compiled; nothing is ever measured without it),
step ("auto": a graph of at most 16 tokens runs as one native call where it can; "off"),
max_slowdown (a rewrite that is predicted to take more than this times the dense op's time at a site is not applied there; default
1.25).
`mode=` may be one of Inductor's modes or a one-line recipe.
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from effllm import compat
from effllm.autotune import problems
from effllm.autotune.budget import parse_budget
from effllm.errors import EffllmError, OptionError, PassError, TuneError, nearest
from effllm.passes import manager, pipeline
from effllm.passes.base import Context
from effllm.passes.parts import in_parts
from effllm.recipe import Recipe
from effllm.report import Report
from effllm.runtime.binding import Binding, PackStore, Want
from effllm.runtime.replay import recorded
from effllm.solvers import solve

store = PackStore(lambda w, params: solve(w, params))
reports: deque[Report] = deque(maxlen=64)


@dataclass(frozen=True)
class Options:
    """Checked options of one torch.compile call."""

    recipe: Recipe = field(default_factory=lambda: Recipe.parse("w8"))
    weights: str = "checked"
    strict: bool = False
    kernel: str | None = None
    inner: str = "inductor"
    mode: str | None = None
    inductor: dict[str, Any] = field(default_factory=dict)
    layers: str = "auto"
    step: str = "auto"
    max_slowdown: float = 1.25
    autotune: float | None = None

    @staticmethod
    def parse(options: dict[str, Any] | None, mode: str | None) -> Options:
        """Read `options=` or `mode=` of torch.compile; raises OptionError or RecipeError."""
        given = dict(options or {})
        for key in given:
            if key not in Options.__dataclass_fields__:
                raise OptionError("E-OPT-KEY", f"unknown option {key!r}", nearest(str(key), Options.__dataclass_fields__))
        if mode is not None:
            given["mode" if mode in compat.inductor_modes() else "recipe"] = mode
        if "recipe" in given:
            given["recipe"] = Recipe.parse(given["recipe"])
        if given.get("autotune") is not None:
            given["autotune"] = parse_budget(given["autotune"])
        made = Options(**given)
        if made.weights not in ("checked", "frozen"):
            raise OptionError("E-OPT-VALUE", f"weights={made.weights!r}", 'weights is "checked" or "frozen"')
        if made.inner not in ("inductor", "eager"):
            raise OptionError("E-OPT-VALUE", f"inner={made.inner!r}", 'inner is "inductor" or "eager"')
        if not isinstance(made.max_slowdown, int | float) or not made.max_slowdown > 0:
            raise OptionError("E-OPT-VALUE", f"max_slowdown={made.max_slowdown!r}", "max_slowdown is a positive number, such as 1.25")
        if made.layers not in ("auto", "once", "inline"):
            raise OptionError("E-OPT-VALUE", f"layers={made.layers!r}", 'layers is "auto", "once" or "inline"')
        if made.step not in ("auto", "off"):
            raise OptionError("E-OPT-VALUE", f"step={made.step!r}", 'step is "auto" or "off"')
        if made.layers == "once" and made.inductor.get("cpp_wrapper"):
            raise OptionError("E-OPT-VALUE", 'layers="once" with cpp_wrapper', "Inductor's C++ wrapper cannot call subgraphs: leave one of them out")
        if made.mode is not None and made.mode not in compat.inductor_modes():
            raise OptionError("E-OPT-VALUE", f"mode={made.mode!r}", nearest(str(made.mode), compat.inductor_modes()))
        for key in made.inductor:
            if key not in compat.inductor_option_names():
                raise OptionError("E-OPT-INDUCTOR", f"Inductor has no option {key!r}", nearest(str(key), compat.inductor_option_names()))
        return made


@dataclass
class Rewritten:
    """A rewritten copy of a graph, with the report and what has to be bound at call time."""

    gm: fx.GraphModule
    report: Report
    keep: list[int]
    wants: list[Want]


def rewrite(gm: fx.GraphModule, options: Options) -> Rewritten:
    """Run the passes on a copy of a Dynamo graph."""
    copy, _ = compat.copy_graph(gm)
    graph = copy.graph
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    layers = "inline" if options.inductor.get("cpp_wrapper") else options.layers
    context = Context(options.recipe, options.strict, options.kernel, max_slowdown=options.max_slowdown, layers=layers, store=store)
    context.step = options.step == "auto"
    report = Report(options.recipe.name, manager.run(pipeline.default(), graph, context), notes=context.notes)
    position = {n: i for i, n in enumerate(inputs)}
    used = {b.source for b in context.bound}
    # a weight that only packed ops read is no input of the compiled graph any more
    dead = {n for n in inputs if n in used and not n.users}
    keep = [i for i, n in enumerate(inputs) if n not in dead]
    bound = sorted(context.bound, key=lambda b: _order(graph, next(iter(b.nodes.values()))))
    wants = [Want(position[b.source], b.params, b.layout, tuple(b.nodes), b.transposed) for b in bound]
    for n in dead:
        graph.erase_node(n)
    graph.lint()
    copy.recompile()
    _note_inference(gm, report)
    return Rewritten(copy, report, keep, wants)


def _order(graph: fx.Graph, node: fx.Node) -> int:
    return next(i for i, n in enumerate(graph.nodes) if n is node)


def _note_inference(gm: fx.GraphModule, report: Report) -> None:
    for n in gm.graph.nodes:
        real = compat.real_tensor(n) if n.op == "placeholder" else None
        if isinstance(real, nn.Parameter) and real.is_inference():
            report.notes.append("some parameters were created under inference_mode and have no version: in-place changes to them go unnoticed")
            return


def effllm(gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | None = None, mode: str | None = None) -> Callable[..., Any]:
    """Compile a Dynamo graph. The incoming graph is never changed."""
    chosen = Options.parse(options, mode)
    compat.numbers_as_constants(gm)
    start = time.perf_counter()
    done = rewrite(gm, chosen)
    if chosen.autotune is not None:
        done = _tuned(gm, done, chosen, chosen.autotune)
    done.report.measured["rewrite_s"] = time.perf_counter() - start
    reports.append(done.report)
    _complain(done.report, chosen)

    def inner(gm: fx.GraphModule, given: list[Any]) -> Callable[..., Any]:
        return compat.compile_inner(gm, given, chosen.mode, chosen.inductor)

    compiled = done.gm.forward if chosen.inner == "eager" else in_parts(done.gm, inner)
    done.report.measured["compile_s"] = time.perf_counter() - start
    if not done.wants:
        return recorded(compiled)
    binding, keep = Binding(store, done.wants, chosen.weights), done.keep
    if keep == list(range(len(keep))) and len(keep) == len(example_inputs):
        return recorded(lambda *args: compiled(*args, *binding(args)))
    return recorded(lambda *args: compiled(*[args[i] for i in keep], *binding(args)))


def _tuned(gm: fx.GraphModule, done: Rewritten, options: Options, budget_s: float) -> Rewritten:
    """Tune the kernels of a graph; rewritten once more where that found anything, so that the Decisions say what runs."""
    from effllm import tuning  # keeps worker processes and the search out of what never asked for them

    start = time.perf_counter()
    try:
        result = tuning.tune_sites(problems.of_graph(rewrite(gm, replace(options, step="off")).gm), budget_s)  # a program hides its kernels
    except TuneError as error:  # a store that cannot be written must not keep a model from running
        warnings.warn(f"effllm: not tuned: {error}", stacklevel=4)
        done.report.notes.append(f"not tuned: [{error.code}] {error.cause}")
        return done
    again = rewrite(gm, options) if result.measured else done
    again.report.measured["autotune_s"] = time.perf_counter() - start
    again.report.notes += result.notes
    return again


def _complain(report: Report, options: Options) -> None:
    """strict: nothing applied or anything failed is an error. Otherwise one warning names what failed and where gradients stood in the way."""
    failed = [d for d in report.decisions if d.action == "failed"]
    plain = ("alone", "unlike", "not-mergeable", "no-rule", "dense", "inline", "not-repeated")
    sites = [d for d in report.decisions if d.action != "applied" and d.code not in plain]
    rewrites = [d for p in report.passes if p.name == "packed_linear" for d in p.decisions]
    if options.strict and (failed or (rewrites and not any(d.action == "applied" for d in rewrites))):
        worst = (failed or sites or rewrites)[0]
        cause = f"strict: {worst.module or worst.site} was not rewritten [{worst.code}] {worst.reason}"
        raise PassError("E-PAS-STRICT", cause, "see effllm.explain(model, inputs, recipe)")
    if failed:
        first = failed[0]
        warnings.warn(f"effllm: {len(failed)} weights could not be packed and stay dense, first {first.module}: [{first.code}] {first.reason}", stacklevel=3)
    elif any(d.code == "grad" for d in rewrites):
        advice = "call the model under torch.no_grad() or torch.inference_mode()"
        warnings.warn(f"effllm: nothing was rewritten because gradients are recorded; {advice}", stacklevel=3)
    slow = [d for d in report.applied if d.kernel == "reference"]
    if slow:
        warnings.warn(f"effllm: no compiled kernel for {len(slow)} sites, the slow reference runs: {slow[0].reason}", stacklevel=3)


def last_report() -> Report:
    """The report of the newest compiled graph."""
    if not reports:
        raise OptionError("E-OPT-NOREPORT", "nothing was compiled by effllm in this process", "call the compiled model once")
    return reports[-1]


def capture(model: nn.Module, inputs: Any, options: Options, *, dynamic: bool | None = None) -> Rewritten | None:
    """The rewritten graph of `model(*inputs)` (or `model(**inputs)` for a dict), without compiling or running a step.

    `dynamic` is that of torch.compile: False keeps sizes static that differed in an earlier call. None where the model calls no tensor
    operation. Raises EffllmError where it cannot be captured in one graph.
    """
    found: list[Rewritten] = []

    def look(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        found.append(rewrite(gm, options))
        raise compat.StopTracing

    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs), {})
    # a fresh function object: neither cached graphs of the model nor ours are touched
    compiled = torch.compile(lambda *a, **k: model(*a, **k), backend=look, fullgraph=True, dynamic=dynamic)
    try:
        with torch.no_grad():
            compiled(*args, **kwargs)
    except Exception as error:
        if not compat.is_stop(error):
            if isinstance(error, EffllmError):
                raise
            cause = f"the model cannot be captured in one graph: {str(error).splitlines()[0]}"
            raise PassError("E-PAS-CAPTURE", cause, "compile parts of it, or remove the graph break") from error
    return found[0] if found else None


def explain(model: nn.Module, inputs: Any, recipe: Any = "w8", **options: Any) -> Report:
    """What the backend would do to `model(*inputs)` (or `model(**inputs)` for a dict), without compiling or running a step.

    Raises EffllmError where the model cannot be captured in one graph.
    """
    chosen = Options.parse({"recipe": recipe, **options}, None)
    done = capture(model, inputs, chosen)
    return Report(chosen.recipe.name, notes=["the model calls no tensor operation"]) if done is None else done.report


def refresh(model: nn.Module) -> int:
    """Pack a model's parameters anew after writes through `.data`, which raise no version. Returns how many packs were dropped."""
    return store.refresh(model)
