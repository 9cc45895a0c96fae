"""`effllm.recover`: distil the dense model into a compressed one, training only what the compression left to train."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effllm import compat
from effllm.errors import OptionError, RecoveryError
from effllm.recovery import adapters, state
from effllm.recovery.adapters import Adapter
from effllm.recovery.data import Data
from effllm.recovery.data import data as read
from effllm.recovery.forward import Body, block_names
from effllm.recovery.loss import Weights
from effllm.recovery.optimizer import Masters
from effllm.recovery.ordered import Ordered
from effllm.recovery.pivoted import plain_forms, quantized
from effllm.recovery.refit import refit as closed_form
from effllm.recovery.report import RecoveryReport
from effllm.recovery.select import Selection, frozen_except, pairs, selected
from effllm.recovery.targets import Targets, asker
from effllm.recovery.trainer import Regularisers, Trainer
from effllm.recovery.truncation import Truncation

Progress = Callable[[int, int, str], None]
# Demo model, 256 tokens a step: low-rank factors at 1.3 times the dense perplexity diverge from 3e-4 on; 2:4 values at 10 times it gain more
# in 40 steps at 1e-3 (0.45 of the log gap left) than at 3e-4 (0.56)
_LR, _LR_CLOSE = 1e-3, 1e-4
_DEFAULT_ADAPTERS = {"perp": Adapter(), "lora": Adapter(), "dsee": Adapter("dsee", rank=4)}


def recover(
    model: nn.Module,
    teacher: nn.Module | Targets,
    data: Any,
    steps: int = 300,
    *,
    what: str | Sequence[str] = "factors",
    batch: int = 2,
    accumulate: int = 1,
    lr: float | None = None,
    warmup: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    decay: float = 0.0,
    clip: float | None = 1.0,
    loss: Weights | Mapping[str, float] | None = None,
    features: int | None = 4,
    adapter: Adapter | None = None,
    masks: Mapping[str, Tensor] | None = None,
    truncation: Truncation | None = None,
    ordered: Ordered | None = None,
    perturbation: float = 0.0,
    refit: int = 0,
    precision: str = "auto",
    seed: int = 0,
    checkpoint: str | Path | None = None,
    every: int = 100,
    resume: bool = False,
    progress: Progress | None = None,
) -> RecoveryReport:
    """Train a compressed model, in place, to answer as its dense teacher does; returns a RecoveryReport.

    teacher: the dense model, or its answers from `cache_targets`. data: token windows, a LongTensor (windows, length), `batch` of
    which make a forward pass, or an iterable of model inputs, one per forward pass; a step reads `accumulate` forward passes.

    what: "factors" trains what compressed modules declare (low-rank and Monarch factors, sparse values); "perp" norms, biases and a
    masked LoRA on pruned linears (arXiv 2312.15230); "lora" that LoRA on every dense linear but the head; "dsee" a low-rank plus
    sparse update of them (arXiv 2111.00160); "all" every parameter; a list of globs the parameters with such names. Adapters are
    merged into their weights at the end and keep pruned weights at zero. masks: of pruned linears, by module name as (out, in);
    without one a weight of zero counts as pruned.

    lr: step size relative to each tensor's root mean square, after a linear warm-up over that share of the steps and along a
    cosine to 0; None is 1e-4 where low-rank factors or whole weights are trained, 1e-3 for sparse values, Monarch factors and adapters.
    The report notes when the loss rose. loss: weights kl, lm, features and temperature, see `Weights`; features: number of blocks whose outputs are matched,
    evenly spaced, None for all. truncation (TRP), ordered (Maestro's ordered dropout) and perturbation (noise on the trained
    tensors, relative to their size, as PELA's regularisation) are options of the low-rank trainer.
    refit: number of items of the data, evenly spaced, on which the left factors of low-rank weights are fitted to the teacher in closed
    form before the first step, see `effllm.recovery.refit`; 0 for none. It asks the teacher itself, not answers of `cache_targets`.

    precision: "fp32", "bf16" (autocast) or "auto": bf16 where the processor multiplies it in hardware. A model in bf16 is trained in bf16 with
    fp32 masters either way. checkpoint: a directory for the state, written every `every` steps and at the end; resume=True goes on
    from it bit for bit (a closed-form fit is made again first). The same arguments give the same result on one machine with the same number of threads.

    Raises RecoveryError (E-REC-NOTHING, E-REC-TEACHER, E-REC-NAN, E-REC-RESUME, E-REC-OUTPUT, E-REC-REFIT), CalibrationError (E-CAL-SHORT,
    E-CAL-FORM), CheckpointError and OptionError. After E-REC-NAN the model has values whose loss and gradients were finite, at most
    20 steps old; after any other error those of the last step. Adapters are merged in both cases, and a closed-form fit
    stays as far as it came.
    """
    _check(steps, batch, accumulate, _LR if lr is None else lr, warmup, perturbation, precision, every)
    if resume and checkpoint is None:
        raise OptionError("E-OPT-RECOVER", "resume=True without a checkpoint directory", "pass checkpoint=")
    start = time.perf_counter()
    weights = loss if isinstance(loss, Weights) else _weights(loss)
    items = read(data, batch, accumulate)
    first = items.join(items.micro(0, seed))
    fitted = _refit(model, teacher, items, refit, progress)
    pruned = truncation is not None or ordered is not None
    with plain_forms(model) if pruned else nullcontext():
        with _evaluating(model), _graph(model) as freeze:
            body = _body(model, first, weights, features)
            ask = asker(teacher, items, body, body.features)
            kind = _precision(precision, model)
            adapted = _adapt(model, what, adapter, masks, body, seed)
            try:
                selection = selected(model, what)
                freeze(selection)
                masters = Masters(selection.parameters, betas=betas, decay=decay, clip=clip)
                regularisers = Regularisers(model, selection, truncation, ordered, perturbation, seed)
                if lr is None:
                    far = isinstance(what, str) and (what in _DEFAULT_ADAPTERS or (what == "factors" and not regularisers.pairs))
                    lr = _LR if far else _LR_CLOSE
                options: dict[str, Any] = {"what": what, "steps": steps, "accumulate": accumulate, "lr": lr, "warmup": warmup, "betas": betas}
                options |= {"decay": decay, "clip": clip, "loss": weights, "adapter": adapter}
                options |= {"truncation": truncation, "ordered": ordered, "perturbation": perturbation}
                if refit:  # absent otherwise: states of older releases have no such setting
                    options |= {"refit": refit}
                settings = _settings(items, body, **options, precision=kind, seed=seed)
                trainer = Trainer(body, ask, items, masters, weights, regularisers, kind, seed, accumulate)
                report = RecoveryReport(selection.what, selection.count, selection.share, str(selection), steps, kind, body.head_name, body.features)
                report.refit = fitted
                folder = None if checkpoint is None else Path(checkpoint)
                if resume and folder is not None and folder.exists():
                    report.resumed_from, report.history = state.load(folder, masters, regularisers.generator, settings)
                _passes(report, items, steps * accumulate)

                def keep(step: int) -> None:
                    if folder is not None:
                        state.save(folder, masters, regularisers.generator, step, settings, report.history)

                report.tokens = trainer.run(report.history, report.resumed_from, steps, lr, round(warmup * steps), progress, every, keep)
            finally:
                # after an error the trainer has put the last good values back: they are worth keeping
                if adapted:
                    adapters.remove(model, merge=True)
        # only now: parameters that are cut get what requires_grad the old ones had at first
        report.ranks = regularisers.finish(masters)
    held = quantized(model) if pruned or refit else []
    if held:
        none = f"not trained and not {'pruned' if pruned else 'fitted'}"
        report.notes.append(f"{len(held)} low-rank weights hold integer codes, which have no gradient: {none} ({held[0]}, ...)")
    if slow := compat.slow_model(model):
        report.notes.append(slow)
    report.seconds = time.perf_counter() - start
    if report.rose:
        report.notes.append(f"the loss rose while it was trained: use a smaller lr than {lr:g}, or more tokens a step (batch, accumulate)")
    return report


def _refit(model: nn.Module, teacher: nn.Module | Targets, items: Data, count: int, progress: Progress | None) -> dict[str, float]:
    """The closed-form fit on `count` items, evenly spaced."""
    if not count:
        return {}
    if not 0 < count <= len(items.items):
        raise OptionError("E-OPT-RECOVER", f"refit={count} of {len(items.items)} items", "give 0, or a number of items that the data has")
    if isinstance(teacher, Targets):
        raise OptionError("E-OPT-RECOVER", "refit with a teacher's cached answers, which leave out its linears", "give the dense model itself, or refit=0")
    with plain_forms(model), _evaluating(model), _evaluating(teacher):
        if not pairs(model):
            raise RecoveryError("E-REC-PAIR", "refit works on floating-point low-rank weights, and the model has none", "leave it out: refit=0")
        return closed_form(model, teacher, [items.items[i * len(items.items) // count] for i in range(count)], progress=progress)


def _check(steps: int, batch: int, accumulate: int, lr: float, warmup: float, perturbation: float, precision: str, every: int) -> None:
    for name, value in (("steps", steps), ("batch", batch), ("accumulate", accumulate), ("every", every)):
        if value < 1:
            raise OptionError("E-OPT-RECOVER", f"{name}={value}", "give at least 1")
    if not (0 < lr < 1 and 0 <= warmup < 1 and 0 <= perturbation < 1):
        raise OptionError("E-OPT-RECOVER", f"lr={lr}, warmup={warmup}, perturbation={perturbation}", "give an lr in (0, 1) and the two others in [0, 1)")
    if precision not in ("auto", "fp32", "bf16"):
        raise OptionError("E-OPT-RECOVER", f"precision={precision!r}", "valid: auto, bf16, fp32")


def _weights(loss: Mapping[str, float] | None) -> Weights:
    try:
        return Weights(**(loss or {}))
    except TypeError as error:
        raise OptionError("E-OPT-LOSS", f"{sorted(loss or {})} are no losses", "valid: kl, lm, features, temperature") from error


def _body(model: nn.Module, first: Any, weights: Weights, features: int | None) -> Body:
    names = block_names(model, features) if weights.features and features != 0 else ()
    try:
        return Body(model, first, names)
    except IndexError as error:
        cause = f"the model does not run on the recovery data: {error}"
        raise RecoveryError("E-REC-VOCABULARY", cause, "tokenize the text with this model's tokenizer") from error


def _adapt(model: nn.Module, what: str | Sequence[str], adapter: Adapter | None, masks: Mapping[str, Tensor] | None, body: Body, seed: int) -> bool:
    """Install adapters where `what` is about them; whether there are any."""
    if not isinstance(what, str) or what not in _DEFAULT_ADAPTERS:
        if adapter is not None or masks is not None:
            raise OptionError("E-OPT-ADAPTER", f"what={what!r} trains no adapter", 'leave adapter and masks out, or use what="perp", "lora" or "dsee"')
        return False
    chosen = adapter or _DEFAULT_ADAPTERS[what]
    if (chosen.kind == "dsee") != (what == "dsee"):
        cause = f"an adapter of kind {chosen.kind!r} for what={what!r}"
        raise OptionError("E-OPT-ADAPTER", cause, 'kind "dsee" belongs to what="dsee", "mask" and "scale" to the others')
    names = adapters.sites(model, what, masks, body.head)
    adapters.install(model, names, chosen, masks, seed)
    return bool(names)


def _precision(wanted: str, model: nn.Module) -> str:
    """ "bf16" (autocast), "fp32", or the model's own narrower dtype."""
    own = {p.dtype for p in model.parameters() if p.is_floating_point() and p.dim() > 1}
    if own and torch.float32 not in own and torch.float64 not in own:
        return f"{str(next(iter(own))).removeprefix('torch.')} model, fp32 masters"
    if wanted != "auto":
        return wanted
    return "bf16" if compat.fast_bf16(next(model.parameters()).device) else "fp32"


def _settings(items: Data, body: Body, **options: Any) -> dict[str, Any]:
    """What a run must have in common with the one that it continues, as JSON."""
    plain = {k: asdict(v) if is_dataclass(v) and not isinstance(v, type) else v for k, v in options.items()}
    return plain | {"data": items.fingerprint(), "batch": items.batch, "blocks": body.features, "head": body.head_name}


def _passes(report: RecoveryReport, items: Data, micros: int) -> None:
    epochs = micros * items.batch / len(items.items)
    if epochs > 8:
        report.notes.append(f"the data was read {epochs:.0f} times: more text would do more good than more steps")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode meanwhile: distillation aims at the teacher's answers, which dropout would blur."""
    was = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in was:
            module.training = training


@contextmanager
def _graph(model: nn.Module) -> Iterator[Callable[[Selection], None]]:
    """Yields a function that lets exactly a selection require grad; at the end every parameter is as it was, without a gradient."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    for p, _, _ in before:
        p.grad = None
    try:
        yield lambda selection: frozen_except(model, selection.parameters.values())
    finally:
        for p, requires, grad in before:
            p.requires_grad_(requires)
            p.grad = grad
