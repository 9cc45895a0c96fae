"""effllm: a torch.compile backend that makes language models small and fast.

    torch.compile(model, backend="effllm")          # rewrites linears by packed weights, near-lossless by default
    effllm.compress(model, "w4")                    # swaps modules in place and frees the dense weights

Importing this package registers the backend; it touches neither CUDA nor Triton.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from effllm import compat as _compat
from effllm.errors import EffllmError
from effllm.recipe import Recipe
from effllm.report import Decision, Report

if TYPE_CHECKING:
    from effllm.activation.calibrate import calibrate
    from effllm.activation.calibration import Calibration
    from effllm.backend import explain, last_report, refresh
    from effllm.compression import compress
    from effllm.hf.demo import load_demo
    from effllm.recovery.run import recover
    from effllm.runtime.checkpoint import load, save
    from effllm.tuning import tune

__version__ = "0.1.0"
__all__ = [
    "Calibration", "Decision", "EffllmError", "Recipe", "Report", "calibrate", "compress", "explain",
    "last_report", "load", "load_demo", "recover", "refresh", "save", "tune",
]  # fmt: skip

_WHERE = {
    "Calibration": "effllm.activation.calibration",
    "calibrate": "effllm.activation.calibrate",
    "explain": "effllm.backend",
    "last_report": "effllm.backend",
    "refresh": "effllm.backend",
    "compress": "effllm.compression",
    "load": "effllm.runtime.checkpoint",
    "save": "effllm.runtime.checkpoint",
    "load_demo": "effllm.hf.demo",
    "recover": "effllm.recovery.run",
    "tune": "effllm.tuning",
}


def __getattr__(name: str) -> Any:
    """Load public functions on first use, so that importing stays light."""
    if name not in _WHERE:
        raise AttributeError(f"module 'effllm' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def _backend(*args: Any, **kwargs: Any) -> Any:
    from effllm import backend

    return backend.effllm(*args, **kwargs)


def _load_tuning(key: str, content: bytes) -> None:
    from effllm.autotune import artifacts

    artifacts.load(key, content)


_compat.register_backend("effllm", _backend)
_compat.register_artifact(_compat.TUNING_ARTIFACT, _load_tuning)
