"""What low-rank recipes need to know of the whole model before the first layer is solved: gradients, and how the ranks are shared out.

Ranks are allocated over all layers that one rule covers, at equal total numbers stored, see `allocate`. "energy" and "sensitivity" look
at the dense model: the first at the singular values that each layer would drop, in the metric of its inputs and of the gradients at its
outputs, which makes the losses of all layers comparable; the second at the KL divergence of the logits with one layer compressed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from effllm.errors import CalibrationError
from effllm.methods import LowRank
from effllm.runtime.dense import matrix
from effllm.runtime.formats.base import Packed
from effllm.solvers import blocks
from effllm.solvers.calibrate import calibrated
from effllm.solvers.lowrank import allocate
from effllm.solvers.lowrank.gradients import Gradients, gradients
from effllm.solvers.lowrank.solve import factorize
from effllm.solvers.lowrank.whitened import spectrum
from effllm.solvers.moments import Moments

Covered = Mapping[str, tuple[nn.Module, LowRank]]
_RATIOS = (0.6, 0.8, 0.9)  # at which a layer's sensitivity is measured
_WINDOWS = 4  # windows that sensitivity is measured on
_STEP = 8  # ranks that are compared
_GRADIENT_WINDOWS = 16


def collect(model: nn.Module, calibration: Any, covered: Covered) -> dict[str, Gradients]:
    """Gradients of the layers whose solver or allocation reads them. CalibrationError (E-CAL-FORM) for inputs that are no token ids."""
    fisher = {n: m for n, (m, p) in covered.items() if p.name == "fwsvd"}
    wanted = {n: m for n, (m, p) in covered.items() if p.weighs_outputs}
    found: dict[str, Gradients] = {}
    if fisher:
        found |= gradients(model, _windows(model, calibration), fisher, weights=True, sampled=False)
    rest = {n: m for n, m in wanted.items() if n not in found}
    if rest:
        found |= gradients(model, _windows(model, calibration), rest)
    return found


def allocated(
    model: nn.Module, calibration: Any, covered: Covered, known: Mapping[str, Gradients], score: Callable[[], float] | None = None
) -> tuple[dict[str, LowRank], dict[str, str]]:
    """Parameters with a rank of its own per layer, and the layers that stay dense with the reason, for one rule's layers."""
    params = next(iter(covered.values()))[1]
    shapes = {n: (matrix(m).shape[0], matrix(m).shape[1]) for n, (m, _) in covered.items()}
    pivoted = params.pivoted
    if params.shared == "welore":
        done = allocate.welore({n: torch.linalg.svdvals(matrix(m).double()) for n, (m, _) in covered.items()}, shapes, params.ratio, pivoted=pivoted)
    elif params.shared == "energy":
        relative = not params.weighs_outputs
        done = allocate.energy(_spectra(model, calibration, covered, known), shapes, params.ratio, pivoted=pivoted, step=_STEP, relative=relative)
    else:
        groups = {n: [n] for n in covered}
        moments = _moments(model, calibration, covered, known)
        with _reference(model, calibration) as divergence:

            def measure(ranks: Mapping[str, int]) -> float:
                with _compressed(covered, ranks, moments):
                    return divergence()

            done = allocate.sensitivity(shapes, groups, _RATIOS, measure, params.ratio, pivoted=pivoted)
    # what "auto" meant was settled by the allocation, which a rank of its own replaces
    statistics, metric = "dense" if params.reads_dense else "sequential", "fisher" if params.weighs_outputs else "plain"
    settled = replace(params, allocation="uniform", statistics=statistics, metric=metric)
    given = {n: replace(settled, rank=r) for n in covered if (r := done.ranks[n]) is not None}
    kept = {n: done.reasons.get(n, "it stays dense at this ratio") for n in covered if n not in given}
    return given, kept


def _windows(model: nn.Module, calibration: Any) -> list[Tensor]:
    found = blocks.batches(calibration)
    blocks.check_ids(model, found)
    ids = [b if isinstance(b, Tensor) else b.get("input_ids") for b in found[:_GRADIENT_WINDOWS]]
    if any(not isinstance(t, Tensor) or t.is_floating_point() for t in ids):
        raise CalibrationError("E-CAL-FORM", "gradients of the language-model loss need windows of token ids", "pass token ids (windows, length)")
    return [row for t in ids if isinstance(t, Tensor) for row in t.reshape(-1, t.shape[-1])]


def _moments(model: nn.Module, calibration: Any, covered: Covered, known: Mapping[str, Gradients]) -> dict[str, Moments]:
    """Moments of every layer in the dense model."""
    found: dict[str, Moments] = {}

    def look(w: Tensor, name: _Name, moments: Moments | None) -> Packed:
        if moments is None:
            raise CalibrationError("E-CAL-UNSEEN", f"no calibration input reached {name}", "give more calibration data")
        found[name] = replace(moments, outputs=known[name].outputs) if name in known else moments
        return Packed("dense", 1, (w.shape[0], w.shape[1]), {})

    calibrated(model, calibration, {n: (m, _Name(n)) for n, (m, _) in covered.items()}, lambda *_: None, solver=look)
    return found


def _spectra(model: nn.Module, calibration: Any, covered: Covered, known: Mapping[str, Gradients]) -> dict[str, Tensor]:
    """Singular values of every layer, in the metric of its inputs in the dense model and of the gradients at its outputs."""
    found: dict[str, Tensor] = {}

    def look(w: Tensor, name: _Name, moments: Moments | None) -> Packed:
        if moments is None:
            raise CalibrationError("E-CAL-UNSEEN", f"no calibration input reached {name}", "give more calibration data")
        found[name] = spectrum(w, replace(moments, outputs=known[name].outputs) if name in known else moments)
        return Packed("dense", 1, (w.shape[0], w.shape[1]), {})

    calibrated(model, calibration, {n: (m, _Name(n)) for n, (m, _) in covered.items()}, lambda *_: None, solver=look)
    return found


class _Name(str):
    """A layer's name in the place of its parameters."""

    requires_calibration = True
    reads_dense = True  # nothing is replaced while the spectra are looked at


@contextmanager
def _reference(model: nn.Module, calibration: Any) -> Iterator[Callable[[], float]]:
    """A function that gives the mean KL divergence of the logits to what they are now, over a few windows."""
    windows = [t.reshape(1, -1)[:, :256] for t in _windows(model, calibration)[:_WINDOWS]]
    training = model.training
    model.eval()
    with torch.no_grad():
        dense = [_log_probabilities(model, ids) for ids in windows]

        def divergence() -> float:
            total = 0.0
            for ids, log_p in zip(windows, dense, strict=True):
                log_q = _log_probabilities(model, ids)
                total += float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
            return total / len(windows)

        try:
            yield divergence
        finally:
            model.train(training)


def _log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    out = model(ids)
    logits: Tensor = out if isinstance(out, Tensor) else out.logits
    return logits.float().log_softmax(-1)


@contextmanager
def _compressed(covered: Covered, ranks: Mapping[str, int], moments: Mapping[str, Moments]) -> Iterator[None]:
    """Some layers' weights at lower ranks for a while."""
    before = {n: matrix(covered[n][0]).detach().clone() for n in ranks}
    try:
        for n, r in ranks.items():
            module, params = covered[n]
            matrix(module).data.copy_(factorize(before[n], replace(params, rank=r), moments[n]).dense())
        yield
    finally:
        for n, w in before.items():
            matrix(covered[n][0]).data.copy_(w)
