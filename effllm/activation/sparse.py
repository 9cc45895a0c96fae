"""The act part of a recipe, applied to a model that is packed (or not) already."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch import nn

from effllm.activation import apply as applying
from effllm.activation.calibrate import calibrate
from effllm.activation.calibration import Calibration
from effllm.methods import Activation
from effllm.report import PassReport


def apply(model: nn.Module, method: Activation, calibration: Any) -> tuple[PassReport, applying.Swap]:
    """Calibrate on data (or take thresholds that were found: a Calibration, or the directory of one) and install, in place.

    Raises CalibrationError; then the model is as it was.
    """
    start = time.perf_counter()
    if method.sparsity == 0:
        report = PassReport("activation_sparsity", [applying.NEUTRAL])
        return report, applying.Swap(model)
    found = Calibration.load(calibration) if isinstance(calibration, str | Path) else calibration
    if not isinstance(found, Calibration):
        found = calibrate(model, calibration, method)
    report, swap = applying.install(model, found, found.plan(method))
    report.seconds = time.perf_counter() - start
    return report, swap
