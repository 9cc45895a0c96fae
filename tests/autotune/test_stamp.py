"""Graph ops carry a stamp of what their configuration depends on, so that a compiler's cache replays no earlier choice."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import effllm
from effllm.autotune import machines, use
from effllm.lowering import providers
from effllm.lowering.bipolar_linear import plain, stamped
from effllm.lowering.op import OPS, Problem


def fresh() -> str:
    use.forget()
    return use.stamp("cpu")


def test_it_changes_with_machine_constants_and_threads(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(machines, "path_of", lambda environment: tmp_path / "here.json")
    first = fresh()
    assert fresh() == first
    (tmp_path / "here.json").write_text("{}")
    assert fresh() != first
    (tmp_path / "here.json").unlink()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert fresh() != first
    finally:
        torch.set_num_threads(threads)
    assert fresh() == first


def test_it_changes_with_every_measurement(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    store = use.Store(tmp_path)
    monkeypatch.setattr(use, "open_store", lambda: store)
    first = fresh()
    where = use.environment("cpu")
    store.path(where, "bipolar_linear").write_text("a line\n")
    assert fresh() != first


def test_modules_and_graphs_carry_it_and_providers_are_found_by_it() -> None:
    provider, _ = providers.select(Problem("bipolar_linear", 32, 64, 8, 32, False))
    name = stamped(provider)
    assert plain(name) == provider.name and (provider.tuning is None) == (name == provider.name)
    model = nn.Sequential(nn.Linear(64, 32))
    effllm.compress(model, "w8")
    assert model[0].weight._form[-1] == name and model[0].weight.kernel == provider.name
    assert effllm.lowering.bipolar_linear.provider("bipolar_linear", name) is OPS["bipolar_linear"].providers[provider.name]
