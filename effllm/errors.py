"""Errors that a user can act on: each has a stable code, a cause and a next step."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EffllmError(Exception):
    """Base class. `code` is stable across releases; `cause` says what is wrong; `next_step` says what to do."""

    def __init__(self, code: str, cause: str, next_step: str) -> None:
        super().__init__(f"[{code}] {cause}\n  next step: {next_step}")
        self.code = code
        self.cause = cause
        self.next_step = next_step

    def __reduce__(self) -> tuple[type[EffllmError], tuple[str, str, str]]:
        return type(self), (self.code, self.cause, self.next_step)


class RecipeError(EffllmError):
    """A recipe that cannot be read or does not fit the model (codes E-RCP-*)."""


class WeightError(EffllmError):
    """A weight that cannot be packed (codes E-WGT-*)."""


class CheckpointError(EffllmError):
    """A saved model that cannot be read or written (codes E-CKP-*)."""


class CalibrationError(EffllmError):
    """Calibration data that does not suffice (codes E-CAL-*)."""


class KernelError(EffllmError):
    """A kernel that cannot be built or called (codes E-KRN-*)."""


class PassError(EffllmError):
    """A graph pass that broke its contract (codes E-PAS-*)."""


class CouplingError(EffllmError):
    """Channels of several parameters that cannot be reordered together (codes E-CPL-*)."""


class TuneError(EffllmError):
    """A tuning result that cannot be kept, read or looked up (codes E-TUN-*)."""


class RecoveryError(EffllmError):
    """A recovery that cannot start or has to stop (codes E-REC-*)."""


class CacheError(EffllmError):
    """A key-value cache that does not fit, is full, or cannot be cropped, saved or loaded (codes E-KVC-*)."""


class EditError(EffllmError):
    """An edit that does not fit the text, or a model whose cache cannot be edited (codes E-EDT-*)."""


class PromptError(EffllmError):
    """Prompts or requests that cannot be run (codes E-PRM-*)."""


class OptionError(EffllmError):
    """An option of the backend or the command line that does not exist or has a wrong value (codes E-OPT-*)."""


def nearest(word: str, valid: Iterable[str]) -> str:
    """The tail of a message: the nearest valid name, and the whole list."""
    names = sorted(valid)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid: {', '.join(names)}"
