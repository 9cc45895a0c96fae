"""Guards for steps that are repeated: what a promise of sameness lets Dynamo leave out before every call.

Dynamo looks at about eight hundred things before each step of a small model: attributes of every cache layer, every module's hooks, functions of
libraries. Together they take as long as a third of the step's layers. Whoever says that modules and caches stay as they are needs only
what tells one call from another: shapes and dtypes of tensors, and the state of grad mode.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

_LAYERS = 8  # of a cache, whose tensors and numbers are still looked at: enough to see one of each kind
_LIBRARY = ("BUILTIN_MATCH", "CLOSURE_MATCH", "CLASS_MATCH", "MODULE_MATCH", "FUNCTION_MATCH", "ID_MATCH")
_OBJECT = ("HASATTR", "NOT_PRESENT_IN_GENERIC_DICT", "TYPE_MATCH")
_LAYER = re.compile(r"\.layers\[(\d+)\]")


def steady_guards(entries: Sequence[Any]) -> list[bool]:
    """Which guards to keep, for torch.compile's `guard_filter_fn`."""
    modules = torch.compiler.skip_guard_on_all_nn_modules_unsafe(entries)
    return [keep and _wanted(entry) for keep, entry in zip(modules, entries, strict=True)]


def _wanted(entry: Any) -> bool:
    layer = _LAYER.search(entry.name)
    if layer:
        return entry.guard_type not in _OBJECT and int(layer[1]) < _LAYERS  # numbers too: windows count in Python
    return entry.guard_type not in _LIBRARY
