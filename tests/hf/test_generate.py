"""`generate`: through the backend, the conditions under which it is not compiled, and a compressed model in every mode."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, DynamicCache, GenerationConfig, StaticCache

from effllm import backend
from effllm.compression import compress
from effllm.errors import OptionError, RecipeError
from effllm.hf.generation import compile_config, why_not_compiled
from effllm.runtime.packed import PackedWeight
from tests.hf.tiny import tiny_llama
from tests.models import relative

NEW = 12


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    backend.reports.clear()


def ids_of(rows: int = 1, count: int = 7) -> Tensor:
    return torch.randint(3, 64, (rows, count), generator=torch.Generator().manual_seed(1))


def dequantized(packed: Any) -> Any:
    """The dense model that holds exactly what a compressed one holds."""
    model = tiny_llama(torch.float32)
    for name, weight in packed.named_modules(remove_duplicate=False):
        if isinstance(weight, PackedWeight):
            with torch.no_grad():
                model.get_parameter(name).copy_(weight.dense())
    return model


def packed(recipe: str, layers: int = 2) -> Any:
    model = tiny_llama(torch.float32, layers=layers)
    compress(model, recipe)
    return model


@torch.no_grad()
def greedy(first: Any, then: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and logits of a prompt read by one model and continued by another."""
    cache = StaticCache(config=first.config, max_cache_len=ids.shape[1] + NEW)
    outs = [first(ids, past_key_values=cache).logits[:, -1]]
    for _ in range(NEW - 1):
        outs.append(then(outs[-1].argmax(-1, keepdim=True), past_key_values=cache).logits[:, -1])
    logits = torch.stack(outs)
    return logits.argmax(-1).T, logits


def test_generate_through_the_backend_decodes_with_packed_weights() -> None:
    model, ids = tiny_llama(torch.float32), ids_of()
    out = model.generate(
        ids, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, cache_implementation="static", output_logits=True,
        return_dict_in_generate=True, compile_config=compile_config("w8", inner="eager", fullgraph=True),
    )  # fmt: skip
    # one graph for all steps; the prompt is read by the dense weights, as the page says
    assert len(backend.reports) == 1 and len(backend.last_report().applied) > 14
    logits = torch.stack(out.logits)
    tokens, want = greedy(model, dequantized(packed("w8")), ids)
    assert torch.equal(out.sequences[:, ids.shape[1] :], tokens)
    assert relative(logits, want) < 2e-5 < relative(logits, greedy(model, model, ids)[1])


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "compiled": ({}, ""),
    "static cache passed": ({"cache_implementation": None, "past_key_values": StaticCache}, ""),
    "plain config": ({"compile_config": CompileConfig(backend="effllm", mode=None)}, "on cpu"),
    "another backend": ({"compile_config": CompileConfig()}, "'inductor'"),
    "no config": ({"compile_config": None}, "no compile_config"),
    "dynamic cache": ({"cache_implementation": None}, "cache is dynamic"),
    "dynamic cache passed": ({"cache_implementation": None, "past_key_values": DynamicCache}, "DynamicCache"),
    "disabled": ({"disable_compile": True}, "disable_compile"),
    "beams": ({"num_beams": 2}, "beam search"),
    "lookup": ({"prompt_lookup_num_tokens": 2, "cache_implementation": None}, "assisted"),
    "one token": ({"max_new_tokens": 1}, "one new token"),
    "quantizer": ({"hf_quantizer": SimpleNamespace(is_compileable=False)}, "quantizer"),
    "offloaded": ({"hf_device_map": {"a": "cpu", "b": "disk"}}, "offloaded"),
}


@pytest.mark.parametrize("case", CASES)
def test_why_not_compiled_tells_what_generate_does(case: str) -> None:
    change, said = CASES[case]
    model = tiny_llama(torch.float32)
    given = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static", "compile_config": compile_config("w8", inner="eager")} | change
    for name in ("hf_quantizer", "hf_device_map"):
        if name in given:
            setattr(model, name, given.pop(name))
    cache = given.get("past_key_values")
    if cache is not None:
        given["past_key_values"] = StaticCache(config=model.config, max_cache_len=32) if cache is StaticCache else DynamicCache()
    given = {k: v for k, v in given.items() if v is not None}
    reasons = why_not_compiled(model, **given)
    model.generate(ids_of(), **given)
    assert bool(backend.reports) == (not reasons)  # the truth is what reached the backend
    assert any(said in r for r in reasons) if said else not reasons


def test_settings_come_from_the_configs_too() -> None:
    model = tiny_llama(torch.float32)
    config = GenerationConfig(cache_implementation="static", compile_config=compile_config())
    assert why_not_compiled(model, config) == [] and why_not_compiled(model)
    model.generation_config = config
    assert why_not_compiled(model) == [] and why_not_compiled(model, disable_compile=True) == ["disable_compile is set"]


def test_transformers_says_that_it_does_not_compile_but_not_why(caplog: pytest.LogCaptureFixture) -> None:
    # the limit that the module's docstring states: if this line is ever gone, a plain config on a CPU is silent
    from transformers.utils import logging as theirs

    logging.Logger.warning_once.cache_clear()  # it says so once per process
    theirs.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            tiny_llama(torch.float32).generate(
                ids_of(), max_new_tokens=2, cache_implementation="static", compile_config=CompileConfig(backend="effllm", mode=None)
            )
    finally:
        theirs.disable_propagation()
    assert "unable to meet the criteria for compilation" in caplog.text and not backend.reports


def test_wrong_options_are_refused_when_the_config_is_made() -> None:
    with pytest.raises(RecipeError):
        compile_config("w9")
    with pytest.raises(OptionError):
        compile_config("w8", iner="eager")


def test_config_survives_the_copies_that_generate_makes() -> None:
    config = copy.deepcopy(compile_config("w4a8"))
    assert config._compile_all_devices and config.to_dict()["options"]["recipe"].name == "w4a8" and config.to_dict()["mode"] is None


@pytest.mark.parametrize("how", ["greedy", "sampling", "beams", "padded"])
def test_compressed_model_generates_what_its_dequantized_twin_does(how: str) -> None:
    model = packed("w4")
    twin, ids = dequantized(model), ids_of(3 if how == "padded" else 1)
    mask = torch.ones_like(ids)
    if how == "padded":  # on the left, of three lengths
        for row in range(3):
            ids[row, : 2 * row], mask[row, : 2 * row] = 2, 0
    settings = {"greedy": {}, "sampling": {"do_sample": True, "top_k": 20}, "beams": {"num_beams": 3}, "padded": {}}[how]
    found = []
    for m in (model, twin, tiny_llama(torch.float32)):
        torch.manual_seed(5)
        found.append(m.generate(ids, attention_mask=mask, **{"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False} | settings))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    if how == "padded":  # padding changes nothing: the last row alone gives the same tokens
        alone = model.generate(ids[2:, 4:], max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
        assert torch.equal(found[0][2, ids.shape[1] :], alone[0, ids.shape[1] - 4 :])


def test_compressed_model_compiles_in_generate() -> None:
    model, ids = packed("w4"), ids_of()
    settings = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "cache_implementation": "static"}
    eager = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, **settings, compile_config=compile_config(inner="eager", fullgraph=True)), eager)
    assert len(backend.reports) == 1


@pytest.mark.slow
def test_compressed_model_under_plain_inductor() -> None:
    model, ids = packed("w4", layers=1), ids_of()
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        got = torch.compile(model, fullgraph=True)(ids, use_cache=False).logits
    assert relative(got, want) < 2e-5


def test_compressed_model_exports() -> None:
    model, ids = packed("w4").requires_grad_(False), ids_of()

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids, use_cache=False).logits

    with torch.no_grad():
        program = torch.export.export(Logits(), (ids,), strict=True)
        assert relative(program.module()(ids), model(ids, use_cache=False).logits) < 2e-5
    assert any("bipolar_linear" in str(n.target) or "effllm" in str(n.target) for n in program.graph.nodes)


def test_steady_steps_do_not_look_at_the_modules() -> None:
    model, ids = packed("w4a8"), ids_of()
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    eager = model.generate(ids, **settings)
    for steady in (True, False):
        torch._dynamo.reset()
        model.eval()
        config = compile_config("w4a8", inner="eager", steady=steady)
        assert torch.equal(model.generate(ids, **settings, compile_config=config), eager)
        for layer in model.model.layers:
            layer.self_attn.training = True  # its dropout is 0: changes nothing but a guarded value
        with torch._dynamo.config.patch(error_on_recompile=True):
            if steady:
                assert torch.equal(model.generate(ids, **settings, compile_config=config), eager)
            else:
                with pytest.raises(torch._dynamo.exc.RecompileError):
                    model.generate(ids, **settings, compile_config=config)
