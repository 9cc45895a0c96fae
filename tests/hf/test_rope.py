"""The recogniser on models: what positions do to keys, or the reason why that is not proved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from effllm.errors import EditError
from effllm.hf import rope
from tests.hf.families import VOCAB, tiny
from tests.hf.rotary_models import PROVED, made


def rotary_module(model: Any) -> Any:
    return next((m for m in model.modules() if hasattr(m, "inv_freq")), None)


@pytest.mark.parametrize("name", list(PROVED))
def test_proved(name: str) -> None:
    _, scaling, layout, channels, factor, limit = PROVED[name]
    model = made(name)
    own = rotary_module(model)
    inv_freq = None if own is None else own.inv_freq.clone()
    found = rope.positions_of(model)
    r = found.rotary
    assert (r.scaling, r.layout, r.channels, r.limit) == (scaling, layout, channels, limit)
    assert r.factor == pytest.approx(factor, rel=1e-7) and all(found.turning)
    if inv_freq is None:  # GPT-J: sines from a table in fp32
        want = 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
        assert (r.omega - want).abs().max() < 1e-7
    else:
        assert torch.allclose(r.omega, inv_freq.double(), rtol=1e-12, atol=0) and r.source.endswith("rotary_emb.inv_freq")
        assert torch.equal(own.inv_freq, inv_freq)  # the proof leaves the model as it was
    assert all(d.action == "applied" and d.reason for d in found.report.decisions)
    assert rope.positions_of(model) is found


class Learned(hf.LlamaForCausalLM):
    """A llama whose hidden states carry positions too."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.places = torch.nn.Embedding(64, config.hidden_size)

    def forward(self, input_ids: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        out = super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)
        out.logits = out.logits + self.places(position_ids).sum()
        return out


def changed(apply: Any) -> Any:
    """A llama with another rotation."""

    def build() -> Any:
        model = made("llama")
        model.model.rotary_emb.forward = apply
        return model

    return build


def squared(x: torch.Tensor, position_ids: torch.Tensor) -> Any:
    angles = (position_ids[..., None].float() ** 2) * torch.linspace(0.001, 1, 16)
    return angles.cos(), angles.sin()


def stretched(x: torch.Tensor, position_ids: torch.Tensor) -> Any:
    angles = position_ids[..., None].float() * torch.cat([torch.linspace(0.01, 1, 8)] * 2)
    return angles.cos() * 2, angles.sin()  # turns and stretches by another factor at every position


def unpaired(x: torch.Tensor, position_ids: torch.Tensor) -> Any:
    angles = position_ids[..., None].float() * torch.linspace(0.01, 1, 16)
    return angles.cos(), angles.sin()


def reset(x: torch.Tensor, position_ids: torch.Tensor) -> Any:
    angles = (position_ids % 1000)[..., None].float() * torch.cat([torch.linspace(0.01, 1, 8)] * 2)
    return angles.cos(), angles.sin()


REFUSED = {
    "gpt2": (lambda: tiny("gpt2"), "[values]"),
    "bloom": (lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=VOCAB, hidden_size=64, n_layer=1, n_head=4)), "traced in one graph"),
    "sliding": (lambda: tiny("mistral"), "sliding window"),
    "half sliding": (lambda: tiny("gemma2"), "sliding window"),
    "leak": (lambda: Learned(made("llama").config), "[leak]"),
    "squared positions": (changed(squared), "[no-rotation]"),
    "no rotation": (changed(stretched), "[angles]"),
    "two angles in a pair": (changed(unpaired), "[no-rotation]"),
    "positions start again": (changed(reset), "[angles]"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused_with_the_reason(name: str) -> None:
    build, reason = REFUSED[name]
    with pytest.raises(EditError) as caught:
        rope.positions_of(build().eval())
    assert caught.value.code in ("E-EDT-ROPE", "E-EDT-WINDOW") and reason in caught.value.cause and caught.value.next_step, caught.value


def test_frequencies_that_follow_the_length() -> None:
    """dynamic NTK grows the base past the trained length; a shorter text forgets it."""
    model = made("dynamic")
    short, long = rope.omega_at(model, 64), rope.omega_at(model, 200)
    base = 10000.0 * ((4.0 * 200 / 64) - 3.0) ** (16 / 14)
    assert torch.allclose(long, base ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16), rtol=1e-5)
    assert torch.equal(rope.omega_at(model, 50), short) and not torch.allclose(short, long)
