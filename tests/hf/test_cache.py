"""CompressedCache with `generate`: every mode equals dense at the neutral setting; lifecycle, files, errors, sliding layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config

from effllm.errors import CacheError, RecipeError
from effllm.hf.cache import CompressedCache
from effllm.hf.generation import cache_for, compile_config
from tests.hf.tiny import tiny_llama

NEUTRAL = "dense(page=8,window=4)"
COARSE = "kivi(bits=2,page=16,group=16,window=4)"
KW: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def model() -> Any:
    made = tiny_llama(torch.float32)
    made.generation_config.eos_token_id = None
    return made


def prompt(rows: int = 1, count: int = 21) -> Tensor:
    return torch.randint(3, 64, (rows, count), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("capacity", [60, None])
@pytest.mark.parametrize("mode", ["greedy", "sampling", "beams", "batch", "beams of a batch"])
def test_neutral_setting_equals_dense(model: Any, mode: str, capacity: int | None) -> None:
    ids = prompt(3 if "batch" in mode else 1)
    kw = KW | ({"do_sample": True, "top_k": 5} if mode == "sampling" else {}) | ({"num_beams": 3} if "beams" in mode else {})
    outs = []
    for cache in (None, CompressedCache(model, NEUTRAL, capacity)):
        torch.manual_seed(0)
        outs.append(model.generate(ids, past_key_values=cache, **kw))
    assert torch.equal(*outs)


@pytest.mark.parametrize("beams", [1, 2])
def test_left_padding(model: Any, beams: int) -> None:
    ids, mask = prompt(3), torch.ones(3, 21, dtype=torch.long)
    mask[0, :9], mask[2, :18] = 0, 0
    want = model.generate(ids, attention_mask=mask, num_beams=beams, **KW)
    cache = CompressedCache(model, NEUTRAL, 60).prepare(model, attention_mask=mask.repeat_interleave(beams, 0))
    assert torch.equal(model.generate(ids, attention_mask=mask, num_beams=beams, past_key_values=cache, **KW), want)


def test_padding_does_not_change_what_is_packed(model: Any) -> None:
    # the bytes of a padded row do not depend on the padding's tokens
    mask = torch.ones(1, 32, dtype=torch.long)
    mask[:, :7] = 0
    pages = []
    for filler in (3, 40):
        ids = prompt(1, 32).masked_fill(mask == 0, filler)
        cache = CompressedCache(model, COARSE, 64).prepare(model, attention_mask=mask)
        with torch.no_grad():
            model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0), past_key_values=cache)
        pages.append(cache.compressed[0].pages)
    assert pages[0].any() and torch.equal(*pages)


def test_effllm_generate_compiles_decoding(model: Any) -> None:
    from effllm import backend

    backend.reports.clear()
    torch._dynamo.reset()
    ids, recipe = prompt(), "dense+kv:dense(page=8,window=4)"
    cache = cache_for(model, recipe, ids.shape[1] + 30)
    out = model.generate(ids, past_key_values=cache, compile_config=compile_config(recipe), **KW)
    assert torch.equal(out, model.generate(ids, **KW))
    assert any(d.code == "append" for d in backend.last_report().decisions)
    with pytest.raises(RecipeError, match="E-RCP-KV"):
        cache_for(model, "w4", 10)


def logits(model: Any, ids: Tensor, cache: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(ids, past_key_values=cache).logits
    return out


@pytest.mark.parametrize("capacity", [100, None])
def test_saved_and_loaded_it_continues_bit_for_bit(model: Any, capacity: int | None, tmp_path: Path) -> None:
    cache = CompressedCache(model, COARSE, capacity)
    logits(model, prompt(2, 45), cache)
    cache.save(tmp_path / "c.safetensors")
    other = CompressedCache(model, COARSE, capacity).load(tmp_path / "c.safetensors")
    more = prompt(2, 3)
    assert torch.equal(logits(model, more, cache), logits(model, more, other))
    assert cache.nbytes == other.nbytes
    with pytest.raises(CacheError, match="E-KVC-METHOD"):
        CompressedCache(model, NEUTRAL).load(tmp_path / "c.safetensors")
    with pytest.raises(CacheError, match="E-KVC-SHAPE"):
        CompressedCache(tiny_llama(layers=3), COARSE).load(tmp_path / "c.safetensors")
    (tmp_path / "d").write_bytes(b"no")
    with pytest.raises(CacheError, match="E-KVC-FILE"):
        CompressedCache(model, COARSE).load(tmp_path / "d")
    with pytest.raises(CacheError, match="E-KVC-SAVE"):
        CompressedCache(model, COARSE).save(tmp_path / "e")


def test_a_capacity_outlives_loading(model: Any, tmp_path: Path) -> None:
    small = CompressedCache(model, COARSE, 60)
    logits(model, prompt(2, 45), small)
    small.save(tmp_path / "c.safetensors")
    larger = CompressedCache(model, COARSE, 200).load(tmp_path / "c.safetensors")
    assert larger.get_max_length() == CompressedCache(model, COARSE, 200).get_max_length() > small.get_max_length()
    assert int(larger.get_seq_length()) == 45
    direct = CompressedCache(model, COARSE, 200)
    logits(model, prompt(2, 45), direct)
    more = prompt(2, 100)
    assert torch.equal(logits(model, more, larger), logits(model, more, direct))
    larger.save(tmp_path / "d.safetensors")
    with pytest.raises(CacheError, match=r"E-KVC-FULL.*145 tokens are stored"):
        small.load(tmp_path / "d.safetensors")
    assert int(small.get_seq_length()) == 45  # unchanged
    assert int(CompressedCache(model, COARSE, 200).load(tmp_path / "d.safetensors").get_seq_length()) == 145
    assert CompressedCache(model, COARSE).load(tmp_path / "c.safetensors").get_max_length() == small.get_max_length()  # it says nothing: the file's


def test_requests_from_a_snapshot_are_isolated(model: Any) -> None:
    cache = CompressedCache(model, COARSE, 100)
    logits(model, prompt(1, 40), cache)
    state = cache.snapshot()
    alone = logits(model, prompt(1, 20), cache)
    cache.restore(state)
    logits(model, prompt(1, 30) + 1, cache)
    cache.restore(state)
    assert torch.equal(logits(model, prompt(1, 20), cache), alone)


def test_crop_reset_and_batch_changes(model: Any) -> None:
    cache, plain = CompressedCache(model, NEUTRAL, 60), CompressedCache(model, NEUTRAL, 60)
    ids = prompt(2, 25)
    logits(model, ids, cache)
    with pytest.raises(CacheError, match="E-KVC-CROP"):
        cache.crop(-20)
    with pytest.raises(ValueError, match="negative"):
        cache.crop(3)
    cache.crop(-2)
    logits(model, ids[:, :23], plain)
    assert int(cache.get_seq_length()) == 23
    tail = ids[:, 23:24]
    assert torch.allclose(logits(model, tail, cache), logits(model, tail, plain), atol=1e-5)  # a prompt of 23 rounds otherwise
    cache.batch_select_indices(torch.tensor([1]))
    plain.reorder_cache(torch.tensor([1, 0]))
    assert torch.allclose(logits(model, tail[1:], cache)[0], logits(model, tail.flip(0), plain)[0], atol=1e-5)
    cache.batch_repeat_interleave(3)
    assert cache.batch_size == 3
    cache.reset()
    assert int(cache.get_seq_length()) == 0 and torch.allclose(logits(model, prompt(3), cache), logits(model, prompt(3), None), atol=1e-5)


def test_a_full_cache_refuses_before_it_writes(model: Any) -> None:
    cache = CompressedCache(model, NEUTRAL, 20)
    limit = cache.get_max_length()
    with pytest.raises(CacheError, match="a prompt of"):
        logits(model, prompt(1, limit + 1), cache)
    logits(model, prompt(1, limit), cache)
    before = cache.snapshot()
    with pytest.raises(CacheError, match="E-KVC-FULL"):
        logits(model, prompt(1, 1), cache)
    assert all(torch.equal(a[1][n], b[1][n]) for a, b in zip(before, cache.snapshot(), strict=True) for n in a[1])


def test_another_models_cache_is_refused(model: Any) -> None:
    cache = CompressedCache(model, NEUTRAL, 20)
    logits(model, prompt(1, 5), cache)
    with pytest.raises(CacheError, match="E-KVC-SHAPE"):
        logits(model, prompt(2, 5), cache)
    with pytest.raises(CacheError, match="E-KVC-SHAPE"):
        logits(tiny_llama(torch.bfloat16), prompt(1, 1), cache)


@pytest.mark.parametrize("capacity", [80, None])
def test_sliding_layers_stay_dense_and_say_so(capacity: int | None) -> None:
    from transformers import Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=16,
    )  # fmt: skip
    other = Gemma2ForCausalLM(config).eval()
    cache = CompressedCache(other, NEUTRAL, capacity)
    assert [d.code for d in cache.decisions] == ["sliding", "compressed"] * 2
    kw = KW | {"pad_token_id": 0}
    assert torch.equal(other.generate(prompt(), past_key_values=cache, **kw), other.generate(prompt(), **kw))


def test_bytes_are_those_of_the_formula(model: Any) -> None:
    for text in ("kivi(bits=4)", "gear(bits=2)"):
        cache = CompressedCache(model, text, 4096).prepare(model)
        layer = cache.compressed[0]
        heads, dim = 2, 16
        pages = (layer.limit - 128) // 64
        want = pages * 64 * layer.format.bytes_per_token(heads, dim, torch.float32) + 2 * heads * 128 * dim * 4 + 24
        assert abs(layer.nbytes - want) < 0.01 * want + pages * heads * 14 * 64  # fields are filled up to 64 bytes, which small heads feel


@torch.no_grad()
def test_one_compiled_function_serves_caches_of_several_formats(model: Any) -> None:
    """Numbers of a format that differ between caches would become dynamic, and then no text of the format can be made."""

    def step(ids: torch.Tensor, cache: Any) -> torch.Tensor:
        out: torch.Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        return out

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for text in ("kivi(bits=4)", "mustafar(sparsity=0.7,page=64)", "gear(bits=2,page=128,window=8)"):
        caches = [CompressedCache(model, text, 300).prepare(model) for _ in range(2)]
        for i in range(3):
            a, b = (f(torch.tensor([[5 + i]]), c) for f, c in zip((compiled, step), caches, strict=True))
            assert torch.allclose(a, b, atol=1e-5)
