"""The evicting cache on a small model: neutral budget, positions, generation, what is refused, state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from effllm.errors import CacheError
from effllm.hf.kv_evict import EvictingCache, observing
from effllm.runtime.caches.ems import Ems

SMALL = Ems(budget=40, slack=8, window=8, sinks=2)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(config).eval()


def ids(length: int, rows: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(64, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_budget_above_the_length_is_dense(model: LlamaForCausalLM) -> None:
    with observing(model):
        cache, dense = EvictingCache(model, Ems(budget=100)), DynamicCache()
        for part in ids(90).split([60, 1, 1, 20, 8], 1):
            a = model(part, past_key_values=cache).logits
            b = model(part, past_key_values=dense).logits
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(model(ids(90)[:, -8:], past_key_values=DynamicCache()).logits, model(ids(90)[:, -8:]).logits)


@torch.no_grad()
def test_prompt_is_exact_and_then_the_budget_holds(model: LlamaForCausalLM) -> None:
    prompt = ids(120)
    cache = EvictingCache(model, SMALL)
    with observing(model):
        torch.testing.assert_close(model(prompt, past_key_values=cache).logits, model(prompt).logits, rtol=1e-4, atol=1e-5)
        size = cache.nbytes
        for step in range(30):
            model(ids(1, seed=step), past_key_values=cache)
            assert all(40 <= layer.count <= 48 for layer in cache.layers)
    layer = cache.layers[0]
    assert cache.get_seq_length() == 150 and cache.nbytes == size
    positions = layer.held["positions"][:, :, : layer.count]
    assert (positions.diff(dim=-1) > 0).all() and (positions[..., -8:] == torch.arange(142, 150)).all() and (positions[..., :2] == torch.arange(2)).all()


@torch.no_grad()
def test_new_tokens_see_what_is_kept(model: LlamaForCausalLM) -> None:
    """Keys stay at the positions where they were rotated: attention over the kept ones by hand gives the same."""
    cache = EvictingCache(model, Ems(budget=40, slack=8, window=8, sinks=2, merge=0))
    with observing(model):
        model(ids(120), past_key_values=cache)
        kept = cache.layers[0].held["positions"][:, :, :40].clone()
    dense = DynamicCache()
    model(ids(120), past_key_values=dense)
    rows = kept[..., None].expand(-1, -1, -1, 16)
    assert torch.equal(cache.layers[0].held["keys"][:, :, :40], dense.layers[0].keys.gather(2, rows))


def test_generation_and_state(model: LlamaForCausalLM, tmp_path: Path) -> None:
    with observing(model):
        made = [model.generate(ids(100), past_key_values=EvictingCache(model, SMALL), max_new_tokens=20, do_sample=False) for _ in range(2)]
        assert torch.equal(made[0], made[1]) and made[0].shape == (2, 120)
        model.generate(ids(100), past_key_values=EvictingCache(model, SMALL), max_new_tokens=5, num_beams=3, do_sample=False)
        cache = EvictingCache(model, SMALL)
        with torch.no_grad():
            model(ids(100), past_key_values=cache)
            cache.save(tmp_path / "c.safetensors")
            other = EvictingCache(model, SMALL).load(tmp_path / "c.safetensors")
            a, b = (model(ids(3), past_key_values=c).logits for c in (cache, other))
            assert torch.equal(a, b)
            cache.crop(-2)
            with pytest.raises(CacheError, match="E-KVC-CROP"):
                cache.crop(-5)
            with pytest.raises(CacheError, match="E-KVC-METHOD"):
                EvictingCache(model, Ems(budget=50)).load(tmp_path / "c.safetensors")


@torch.no_grad()
def test_refusals(model: LlamaForCausalLM) -> None:
    cache = EvictingCache(model, SMALL)
    model(ids(100), past_key_values=cache)
    with pytest.raises(CacheError, match="E-KVC-OBSERVE"):
        model(ids(1), past_key_values=cache)
    mask = torch.ones(2, 100, dtype=torch.long)
    mask[0, :7] = 0
    with observing(model), pytest.raises(CacheError, match="E-KVC-PADDING"):
        model(ids(100), attention_mask=mask, past_key_values=EvictingCache(model, SMALL))
    with pytest.raises(CacheError, match="E-KVC-VALUE"):
        EvictingCache(model, Ems(budget=30, window=32))


@torch.no_grad()
def test_weight_of_merged_tokens_reaches_the_logits(model: LlamaForCausalLM) -> None:
    outs = []
    for weighted in (False, True):
        cache = EvictingCache(model, Ems(budget=40, slack=8, window=8, sinks=2, threshold=0.0, weighted=weighted))
        with observing(model):
            model(ids(120), past_key_values=cache)
            assert bool((cache.layers[0].held["weight"] > 0).any()) == weighted
            outs.append(model(ids(2), past_key_values=cache).logits)
    assert float((outs[0] - outs[1]).abs().max()) > 1e-4
