"""Low-rank solvers: from a dense weight and its statistics to two factors. One file per method; `factorize` calls them by name."""

from __future__ import annotations

from torch import Tensor

from effllm.errors import CalibrationError, RecipeError, nearest
from effllm.solvers.lowrank.afm import afm
from effllm.solvers.lowrank.asvd import asvd
from effllm.solvers.lowrank.factors import Factors
from effllm.solvers.lowrank.fwsvd import fwsvd
from effllm.solvers.lowrank.pivots import pivoted
from effllm.solvers.lowrank.svd import svd
from effllm.solvers.lowrank.whitened import whitened
from effllm.solvers.moments import Moments

CALIBRATED = {"fwsvd": fwsvd, "asvd": asvd, "whitened": whitened, "afm": afm}
METHODS = ("svd", *CALIBRATED)


def factorize(w: Tensor, method: str, rank: int, moments: Moments | None = None, *, pivots: bool = False) -> Factors:
    """Factors of w (N, K) at a rank; with `pivots` in the form that stores r^2 numbers less.

    Raises RecipeError (E-RCP-METHOD), CalibrationError (E-CAL-NONE) where the method needs moments, and what the methods raise.
    """
    if method == "svd":
        found = svd(w, rank)
    elif method not in CALIBRATED:
        raise RecipeError("E-RCP-METHOD", f"unknown low-rank method {method!r}", nearest(method, METHODS))
    elif moments is None:
        raise CalibrationError("E-CAL-NONE", f"{method} needs calibration data", "pass calibration=, or use svd")
    else:
        found = CALIBRATED[method](w, rank, moments)
    return pivoted(found) if pivots else found
