"""Public names stay what they are, whichever submodule was imported first."""

from __future__ import annotations

import importlib
import pkgutil

import effllm


def test_no_submodule_shadows_a_public_name() -> None:
    modules = {m.name for m in pkgutil.iter_modules(effllm.__path__)}
    assert not modules & set(effllm.__all__)


def test_every_public_name_resolves() -> None:
    for name, where in effllm._WHERE.items():
        importlib.import_module(where)
        assert callable(getattr(effllm, name)), name
