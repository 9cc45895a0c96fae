"""`effllm.compress`: swap Linear, Conv1D and Embedding modules for packed ones, in place, and free the dense weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effllm import compat
from effllm.activation import sparse
from effllm.activation.calibration import Calibration
from effllm.errors import CalibrationError, EffllmError, OptionError, PassError
from effllm.methods import Method
from effllm.preparation import Assigned, prepare
from effllm.recipe import Recipe
from effllm.report import Decision, PassReport, Report
from effllm.runtime import dense as modules
from effllm.runtime import weights
from effllm.runtime.formats.base import Packed
from effllm.runtime.packed import PackedEmbedding, PackedLinear, PackedWeight
from effllm.runtime.recorded import record
from effllm.solvers import check, solve

Progress = Callable[[int, int, str], None]


@contextmanager
def one_thread() -> Iterator[None]:
    """Packing works on cache-sized chunks, where waking a second thread costs more than it brings (7x on a busy machine)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Site:
    """A module that a rule covers."""

    name: str
    module: Any  # Linear, Conv1D or Embedding
    params: Method

    @property
    def kind(self) -> str:
        """linear or embedding."""
        return modules.kind_of(self.module)

    @property
    def matrix(self) -> Tensor:
        """The dense weight as (out, in)."""
        return modules.matrix(self.module)


def plan(model: nn.Module, recipe: Recipe) -> tuple[list[Site], list[Decision]]:
    """The modules to pack, and a Decision for every Linear, Conv1D or Embedding and every matrix of another module that is left alone."""
    sites: list[Site] = []
    kept: list[Decision] = []
    whole = ""  # the last module that was judged as a whole, its parts (parametrizations) included
    for name, module in model.named_modules():
        if whole and name.startswith(f"{whole}."):
            continue
        if isinstance(module, PackedLinear | PackedEmbedding):
            kept.append(_kept(name, "packed", "it is packed already"))
        kind = modules.kind_of(module)
        if not kind:
            matrices = [(leaf, p) for leaf, p in module.named_parameters(recurse=False) if p.dim() > 1]
            kept += [_kept(f"{name}.{leaf}" if name else leaf, "other-module", _other(module, p)) for leaf, p in matrices]
        else:
            whole = name
            n, k = modules.matrix(module).shape
            rule = recipe.rule_for(name, kind, (n, k))
            if rule is None or rule.method == "dense":
                kept.append(_kept(name, "no-rule" if rule is None else "dense", "no rule covers it" if rule is None else "the recipe keeps it dense"))
                continue
            if not name:
                kept.append(_kept(name, "root", "the model itself is one Linear, Conv1D or Embedding and has no parent to swap it in; wrap it in a module"))
                continue
            reason = _obstacle(module)
            if reason:
                kept.append(_kept(name, "not-plain", reason))
                continue
            sites.append(Site(name, module, rule.params))
    return sites, kept


def _bias(bias: Tensor | None, shift: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The linear's bias with what a solver moved into it (AFM), in the bias's dtype."""
    if shift is None:
        return bias
    return shift.to(dtype) if bias is None else (bias.detach().double() + shift.double()).to(bias.dtype)


def _split_shift(packed: Packed) -> tuple[Packed, Tensor | None]:
    """A weight without its shift, which goes into the linear's bias, and the shift."""
    rest = {k: t for k, t in packed.tensors.items() if k != "shift"}
    return replace(packed, tensors=rest), packed.tensors.get("shift")


def _identity(module: nn.Module) -> tuple[int, bool]:
    """Modules with the same identity share one matrix."""
    return id(module.weight), modules.is_transposed(module)


def _other(module: nn.Module, p: Tensor) -> str:
    return f"{type(module).__name__} holds it, of shape {tuple(p.shape)}; only Linear, Conv1D and Embedding modules are packed"


def _kept(name: str, code: str, reason: str) -> Decision:
    return Decision(name, name, "kept", code, reason)


def _obstacle(module: nn.Module) -> str:
    """Why a module cannot be swapped, or an empty string."""
    base = next(cls for cls in (nn.Linear, nn.Embedding, compat.conv1d()) if cls is not None and isinstance(module, cls))
    if type(module).forward is not base.forward:  # type: ignore[attr-defined]
        return f"{type(module).__name__} has a forward of its own"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "its owner reads the weight directly (nn.MultiheadAttention)"
    if nn.utils.parametrize.is_parametrized(module):
        return "its weight is parametrized"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return "it carries hooks, which a swap would lose"
    if isinstance(module, nn.Embedding) and (module.max_norm or module.sparse or module.scale_grad_by_freq):
        return "max_norm, sparse or scale_grad_by_freq is set"
    return ""


class Swap:
    """Puts packed modules into a model and can take all of them out again."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.after_rollback: Callable[[], None] = lambda: None  # undoes what was done to the dense weights
        self._undo: list[tuple[nn.Module, str, nn.Module]] = []
        self._shared: dict[tuple[int, bool], tuple[Method, PackedWeight]] = {}
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}  # one module may sit in several
        for parent in model.modules():
            for leaf, child in parent._modules.items():
                self._places.setdefault(id(child), []).append((parent, leaf))

    def shared(self, site: Site) -> PackedWeight | None:
        """The packed form of a tied weight that is already in the model with the same numbers."""
        found = self._shared.get(_identity(site.module))
        return found[1] if found and found[0].stored_as() == site.params.stored_as() else None

    def install(self, site: Site, packed: Packed | None) -> PackedWeight:
        """Swap one module; `packed` None means that its tied weight is already packed."""
        dense = site.module
        packed, shift = (None, None) if packed is None else _split_shift(packed)
        weight = self.shared(site) if packed is None else None
        if weight is None:
            if packed is None:
                raise OptionError("E-OPT-SWAP", f"{site.name} has no packed weight", "report this bug")
            act = site.params.act if site.kind == "linear" else "a16"
            weight = weights.make(packed, act=act, dtype=dense.weight.dtype)
            self._shared.setdefault(_identity(dense), (site.params, weight))
        new: nn.Module
        new = PackedLinear(weight, _bias(dense.bias, shift, weight.dtype)) if site.kind == "linear" else PackedEmbedding(weight, dense.padding_idx)
        new.train(dense.training)
        # the dense module stays referenced until the whole model is done: then a failure can be undone
        for parent, leaf in self._places[id(dense)]:
            self._undo.append((parent, leaf, dense))
            setattr(parent, leaf, new)
        return weight

    def rollback(self) -> None:
        """Restore every dense module."""
        while self._undo:
            parent, leaf, dense = self._undo.pop()
            setattr(parent, leaf, dense)
        self.after_rollback()

    def commit(self) -> None:
        """Let the dense weights go."""
        self._undo.clear()


def compress(model: Any, recipe: Any = "w8", calibration: Any = None, *, strict: bool = False, progress: Progress | None = None) -> Any:
    """Pack a model's Linear, Conv1D and Embedding weights as `recipe` says.

    model: an nn.Module (changed in place; returns the Report), or a local Hugging Face directory (read shard by shard with at most
    the packed model plus two dense layers in memory; returns (model, Report)). With calibration a directory needs the packed model,
    one dense decoder block or the embedding and the head, and the activations of the windows; where the model's blocks form no
    chain the dense model is loaded whole and the report's notes say why. Weights that are tied stay tied. The result is for
    inference: every parameter is frozen (kernels have no gradients; `recover` and a requires_grad_() of yours open what they train).
    calibration: token windows, a LongTensor (windows, length), or an iterable of model inputs; turns on the second-order solver. For
    an act part also what `calibrate` returned for this very model, or the directory it was saved in: the weights must be as they were.
    progress: called with (done, total, name).

    On any error the model is as it was: weights are checked before the first swap, and the dense modules are kept until the last
    one is done (peak: dense plus packed; the directory form needs less).
    Raises RecipeError, WeightError, CalibrationError; with strict=True PassError where the recipe applied to nothing.
    """
    parsed = Recipe.parse(recipe)
    data, thresholds = _calibration(parsed, calibration)
    if isinstance(model, str | Path):
        from effllm.hf.directory import compress_directory

        packed, made = compress_directory(Path(model), parsed, data, strict=strict, progress=progress)
        if parsed.act is not None:
            made.passes.append(sparse.apply(packed, parsed.act, calibration)[0])
        return packed, made
    if not isinstance(model, nn.Module):
        raise OptionError("E-OPT-MODEL", f"cannot compress a {type(model).__name__}", "pass an nn.Module or a local Hugging Face directory")
    start = time.perf_counter()
    sites, kept = plan(model, parsed)
    if parsed.act is None:
        require(sites, kept, strict)
    for site in sites:
        try:
            check(site.matrix, site.params)
        except EffllmError as error:
            raise type(error)(error.code, f"{site.name}: {error.cause}", error.next_step) from None
    slow = compat.slow_model(model) if data is not None else ""
    swap = Swap(model)
    report = PassReport("compress", kept)
    try:
        with torch.no_grad():
            _run(model, sites, swap, report, data, progress)
            report.seconds = time.perf_counter() - start
            passes = [report] if parsed.act is None else [report, sparse.apply(model, parsed.act, thresholds)[0]]
    except BaseException:
        swap.rollback()
        raise
    swap.commit()
    if sites or parsed.act is not None:
        model.requires_grad_(False)
    record(model, parsed.name)
    return Report(parsed.name, passes, notes=[slow] if slow else [])


def _calibration(recipe: Recipe, given: Any) -> tuple[Any, Any]:
    """What the weights and what the activations are calibrated with; a Calibration is thresholds, not data."""
    if isinstance(given, Calibration | str | Path):
        if recipe.act is None:
            if isinstance(given, str) and not Path(given).exists():
                return given, given  # text is not calibration data, which is said where the data is read
            raise OptionError("E-OPT-CALIBRATION", f"thresholds of activations for the recipe {recipe.name!r}", "add an act part, or pass token windows")
        return None, given
    if recipe.act is not None and given is None:
        cause = f"the recipe asks for {recipe.act.label} activation sparsity, which needs calibration data"
        raise CalibrationError("E-CAL-NONE", cause, "pass calibration= token windows of at least 16384 tokens, or what effllm.calibrate returned")
    return given, given


def require(sites: list[Site], kept: list[Decision], strict: bool) -> None:
    """strict: a recipe that applies to nothing is an error."""
    if strict and not sites:
        why = f": {kept[0].module} [{kept[0].code}] {kept[0].reason}" if kept else ": the model has no Linear, Conv1D or Embedding"
        raise PassError("E-PAS-STRICT", f"strict: the recipe applied to nothing{why}", "see Recipe.preview(model)")


def _run(model: nn.Module, sites: list[Site], swap: Swap, report: PassReport, calibration: Any, progress: Progress | None) -> None:
    ready = prepare(model, {s.name: (s.module, s.params) for s in sites if s.kind == "linear"}, calibration)
    swap.after_rollback = ready.undo
    report.decisions += [*ready.also, *ready.kept]
    dense = {d.module for d in ready.kept}
    sites = [replace(s, params=ready.params.get(s.name, s.params)) for s in sites if s.name not in dense]
    total, done = len(sites), 0

    def finish(site: Site, packed: Packed | None) -> None:
        nonlocal done
        before = site.module.weight
        weight = swap.install(site, packed)
        report.decisions.append(decision(site, before.numel() * before.element_size(), weight, tied=packed is None))
        done += 1
        if progress is not None:
            progress(done, total, site.name)

    # heads before embeddings: a tied pair is packed once, with the head's kernel
    direct = sorted(sites, key=lambda s: s.kind != "linear")
    if calibration is not None:
        from effllm.solvers.calibrate import calibrated

        by_name = {s.name: s for s in sites if s.kind == "linear" and s.params.calibrates}
        covered = {name: (s.module, ready.assigned(name)) for name, s in by_name.items()}
        calibrated(model, calibration, covered, lambda name, packed: finish(by_name[name], packed), targets=ready.aims, solver=Assigned.solve)
        direct = [s for s in direct if s.name not in by_name]
    with one_thread():
        for site in direct:
            tied = swap.shared(site) is not None
            try:
                packed = None if tied else solve(site.matrix, site.params)
            except EffllmError as error:
                raise type(error)(error.code, f"{site.name}: {error.cause}", error.next_step) from None
            finish(site, packed)


def decision(site: Site, dense_bytes: int, weight: PackedWeight, *, tied: bool) -> Decision:
    """The Decision of a packed module; a tied weight's bytes count once."""
    reason = "shares its tied weight" if tied else weight.why
    before, after = (0, 0) if tied else (dense_bytes, weight.nbytes)
    code = "tied" if tied else "applied"
    return Decision(site.name, site.name, "applied", code, reason, before, after, kernel=weight.kernel, config=weight.config)
