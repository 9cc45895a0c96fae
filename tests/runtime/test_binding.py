"""Weights are looked up at call time: the six identity cases, tied weights, freed ids, sharing, and both modes."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import effllm
from effllm import backend
from effllm.errors import OptionError
from effllm.recipe import Bipolar
from effllm.runtime.binding import Binding, PackStore, Want
from effllm.solvers import solve
from tests.models import One, Tied, relative

# a stale or foreign weight is off by more than 1.2. Of the structured recipes those that need no data: the backend has none to calibrate
# with, and says so in a Decision for all others (tests/test_structured.py)
TOLERANCE = {
    "w8": 0.02, "w4": 0.2, "w4a8": 0.2, "w2": 0.9,
    "svd(ratio=0.9)": 0.3, "svd(ratio=0.9, pivoted=false, bits=8)": 0.7, "monarch(ratio=0.9)": 0.7, "nm(pattern=2:4)": 0.7, "nm(pattern=6:8, bits=4)": 0.5,
}  # fmt: skip
RECIPES = list(TOLERANCE)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def compiled(model: object, recipe: str, **more: object) -> object:
    # however slow on this machine: the cases are about identity, and a site that stays dense would pass them all
    return torch.compile(model, backend="effllm", options={"recipe": recipe, "inner": "eager", "max_slowdown": 1e9, **more})


def right(call: object, model: nn.Module, x: torch.Tensor, recipe: str) -> None:
    with torch.no_grad():
        assert relative(call(x), model(x)) < TOLERANCE[recipe]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_is_applied_at_all(recipe: str) -> None:
    model, x = One(), torch.randn(2, 64)
    with torch.no_grad():
        assert 1e-4 < relative(compiled(model, recipe)(x), model(x)) < TOLERANCE[recipe]


@pytest.mark.parametrize("recipe", RECIPES)
def test_several_instances_of_one_class(recipe: str) -> None:
    models, x = [One() for _ in range(3)], torch.randn(2, 64)
    for m, c in [(m, compiled(m, recipe)) for m in models]:
        right(c, m, x, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_compile_in_place_per_layer(recipe: str) -> None:
    models, x = [One() for _ in range(3)], torch.randn(2, 64)
    with torch.no_grad():
        dense = [m(x) for m in models]
        for m in models:
            m.compile(backend="effllm", options={"recipe": recipe, "inner": "eager", "max_slowdown": 1e9})
        for m, y in zip(models, dense, strict=True):
            assert relative(m(x), y) < TOLERANCE[recipe]


@pytest.mark.parametrize("recipe", RECIPES)
def test_module_as_an_argument(recipe: str) -> None:
    models, x = [One() for _ in range(3)], torch.randn(2, 64)
    call = compiled(lambda m, v: m(v), recipe)
    with torch.no_grad():
        for m in models:
            assert relative(call(m, x), m(x)) < TOLERANCE[recipe]


@pytest.mark.parametrize("recipe", RECIPES)
def test_update_in_place(recipe: str) -> None:
    model, x = One(), torch.randn(2, 64)
    call = compiled(model, recipe)
    right(call, model, x, recipe)
    with torch.no_grad():
        model.w.weight.copy_(torch.randn(64, 64))
    right(call, model, x, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_parameter_assigned_anew(recipe: str) -> None:
    model, x = One(), torch.randn(2, 64)
    call = compiled(model, recipe)
    right(call, model, x, recipe)
    model.w.weight = nn.Parameter(torch.randn(64, 64))
    right(call, model, x, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_load_state_dict(recipe: str) -> None:
    model, x = One(), torch.randn(2, 64)
    call = compiled(model, recipe)
    right(call, model, x, recipe)
    model.load_state_dict(One().state_dict())
    right(call, model, x, recipe)


def test_write_through_data_needs_refresh() -> None:
    model, x = One(), torch.randn(2, 64)
    call = compiled(model, "w8")
    right(call, model, x, "w8")
    model.w.weight.data.mul_(-1.0)
    with torch.no_grad():
        assert relative(call(x), model(x)) > 0.5  # the documented limit
    assert effllm.refresh(model) == 1
    right(call, model, x, "w8")


def test_tied_weight_is_packed_once_and_follows_its_parameter() -> None:
    model, ids = Tied(), torch.randint(0, 48, (2, 5))
    before = backend.store.packs
    call = compiled(model, "w8")
    right(call, model, ids, "w8")
    assert backend.store.packs - before == 1 + 2 * 3  # embedding and head share one pack
    with torch.no_grad():
        model.emb.weight.mul_(0.5)
    right(call, model, ids, "w8")


def test_packs_are_shared_by_all_graphs_of_a_model() -> None:
    model = One()
    before = backend.store.packs
    call = torch.compile(model, backend="effllm", dynamic=False, options={"recipe": "w4", "inner": "eager"})
    for rows in (1, 3, 7):
        right(call, model, torch.randn(rows, 64), "w4")
    assert backend.store.packs - before == 1


def test_id_of_a_freed_parameter_is_not_trusted() -> None:
    """The same id with other content: entries are keyed by weak reference, not by id alone."""
    store = PackStore(lambda w, p: solve(w, p))
    params = Bipolar(bits=8, offset="none")
    weight = torch.randn(16, 32)
    first = store.tensors(weight, params, "planes")["codes"].clone()
    other = torch.randn(16, 32)
    entry = store._entries.pop(id(weight))
    store._entries[id(other)] = entry  # what a reused id looks like
    assert not torch.equal(store.tensors(other, params, "planes")["codes"], first)


def test_entries_go_with_their_parameters() -> None:
    store = PackStore(lambda w, p: solve(w, p))
    weight = torch.randn(16, 32)
    binding = Binding(store, [Want(0, Bipolar(bits=4, offset="none"), "planes", ("codes", "scale"))], "checked")
    kept = binding([weight])
    assert len(store._entries) == 1
    generation = store.generation
    del weight, kept
    gc.collect()
    assert not store._entries and store.generation > generation
    for _ in range(20):  # some of these get the freed id
        again = torch.randn(16, 32)
        fresh = PackStore(lambda w, p: solve(w, p)).tensors(again, Bipolar(bits=4, offset="none"), "planes")
        assert torch.equal(binding([again])[0], fresh["codes"])
        del again
        gc.collect()


def test_frozen_looks_up_once() -> None:
    model, x = One(), torch.randn(2, 64)
    call = compiled(model, "w8", weights="frozen")
    with torch.no_grad():
        y = call(x)
        model.w.weight.mul_(-1.0)
        assert torch.equal(call(x), y)


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(OptionError, match="E-OPT-VALUE"):
        Binding(PackStore(lambda w, p: solve(w, p)), [], "sometimes")


def test_inference_parameters_count_as_frozen_and_the_report_says_so() -> None:
    with torch.inference_mode():
        model = One()
        x = torch.randn(2, 64)
        y = compiled(model, "w8")(x)
        assert relative(y, model(x)) < TOLERANCE["w8"]
    assert any("inference_mode" in note for note in effllm.last_report().notes)
