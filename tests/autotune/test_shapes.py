"""Layer shapes against the published configs: the parameter counts that they imply are the published ones."""

from __future__ import annotations

import pytest

from effllm.autotune.shapes import MODELS, find, sites
from effllm.errors import OptionError

# parameters as the model cards (safetensors) count them
PARAMETERS = {
    "SmolLM2-135M": 134_515_008,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3-8B": 8_030_261_248,
    "Qwen3-4B": 4_022_468_096,
    "Mistral-7B": 7_241_732_096,
}


@pytest.mark.parametrize("name", MODELS)
def test_shapes_add_up_to_the_published_parameters(name: str) -> None:
    a = MODELS[name]
    layers = a.layers()
    own = sum(n * k for layer, (n, k) in layers.items() if layer in ("q", "k", "v", "o", "gate", "up", "down"))
    norms = 2 * a.hidden + (2 * a.head_dim if a.qk_norm else 0)
    vocabulary = a.vocabulary * a.hidden * (1 if a.tied else 2)
    assert a.blocks * (own + norms) + a.hidden + vocabulary == PARAMETERS[name]


@pytest.mark.parametrize("name", MODELS)
def test_merged_layers_hold_their_parts(name: str) -> None:
    layers = MODELS[name].layers()
    assert layers["qkv"][0] == sum(layers[part][0] for part in "qkv")
    assert layers["gate_up"][0] == layers["gate"][0] + layers["up"][0]
    assert len({layers[part][1] for part in ("q", "qkv", "gate_up", "head")}) == 1


def test_known_shapes() -> None:
    assert MODELS["SmolLM2-135M"].layers()["qkv"] == (960, 576)
    assert MODELS["Llama-3-8B"].layers()["down"] == (4096, 14336)
    assert MODELS["Qwen3-4B"].layers()["o"] == (2560, 4096)  # heads x head_dim is not the hidden size
    assert MODELS["Llama-3.2-1B"].layers()["head"] == (128256, 2048)


@pytest.mark.parametrize("name", MODELS)
def test_sites_are_distinct_and_cover_every_layer(name: str) -> None:
    found = sites(name.upper())
    assert len({(s.n, s.k) for s in found}) == len(found)
    assert sorted(layer for s in found for layer in s.layers) == sorted(MODELS[name].layers())
    assert [s.layers for s in found if s.is_head] == [("head",)]
    assert all(MODELS[name].layers()[layer] == (s.n, s.k) for s in found for layer in s.layers)


def test_unknown_model_names_the_nearest() -> None:
    with pytest.raises(OptionError, match="did you mean 'Llama-3-8B'") as caught:
        find("Llama3-8B")
    assert caught.value.code == "E-OPT-SHAPES"
