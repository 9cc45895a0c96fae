"""Everything a user can get wrong with a compressed cache: a clear error, before anything is written wherever that can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from effllm.errors import CacheError
from effllm.hf.cache import CompressedCache
from tests.hf.tiny import tiny_llama

FORMATS = (
    "kivi(bits=4,page=16,group=16,window=4)", "gear(bits=2,page=16,group=16,window=4)", "gear(bits=4,page=16,group=16,window=4,factors=8)",
    "mustafar(sparsity=0.5,page=64,window=4)", "bfp(bits=4,page=16,block=16,window=4)", "matryoshka(k=full,v=full,page=16,window=4)",
    "dense(page=16,window=4)",
)  # fmt: skip
EACH = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.split("(")[0])


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(torch.float32)


def ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(64, (1, count), generator=torch.Generator().manual_seed(seed))


def state(cache: CompressedCache) -> list[torch.Tensor]:
    return [t.clone() for layer in cache.compressed for t in layer.tensors().values()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@EACH
@torch.no_grad()
def test_capacity(model: Any, fmt: str) -> None:
    cache = CompressedCache(model, fmt, 150)
    limit = cache.get_max_length()
    with pytest.raises(CacheError, match=r"E-KVC-FULL.*a prompt of"):
        model(ids(limit + 1), past_key_values=cache)
    assert int(cache.get_seq_length()) == 0
    model(ids(limit - 2), past_key_values=cache)
    before = state(cache)
    with pytest.raises(CacheError, match="E-KVC-FULL"):
        model(ids(3), past_key_values=cache)
    assert same(before, state(cache))
    model(ids(2), past_key_values=cache)  # it goes on as if nothing had happened
    assert int(cache.get_seq_length()) == limit


@EACH
@torch.no_grad()
def test_crop_into_a_packed_page(model: Any, fmt: str) -> None:
    cache = CompressedCache(model, fmt)
    model(ids(140), past_key_values=cache)
    dense = 140 - int(cache.compressed[0].lens[1])
    before = state(cache)
    with pytest.raises(CacheError, match="E-KVC-CROP"):
        cache.crop(-dense - 1)
    assert same(before, state(cache))
    cache.crop(-dense)
    assert int(cache.get_seq_length()) == 140 - dense


@torch.no_grad()
@pytest.mark.parametrize("saved", FORMATS, ids=lambda f: f.split("(")[0])
def test_a_file_of_one_method_is_no_other(model: Any, saved: str, tmp_path: Path) -> None:
    cache = CompressedCache(model, saved)
    model(ids(90), past_key_values=cache)
    cache.save(tmp_path / "c")
    for fmt in FORMATS:
        other = CompressedCache(model, fmt)
        if fmt == saved:
            assert same(state(cache), state(other.load(tmp_path / "c")))
            continue
        with pytest.raises(CacheError, match="E-KVC-METHOD"):
            other.load(tmp_path / "c")
        assert not any(layer.ready for layer in other.compressed)


@torch.no_grad()
def test_settings_that_a_file_does_not_name_have_their_defaults(model: Any) -> None:
    cache = CompressedCache(model, FORMATS[1])
    model(ids(60), past_key_values=cache)
    layer = cache.compressed[0]
    about = layer.about() | {"format": FORMATS[1]}  # written before the format had `factors`
    layer.load(about, layer.tensors())
    for text in ("kivi(bits=4", "gear(bits=2)", None):
        with pytest.raises(CacheError, match="E-KVC-METHOD"):
            layer.load(about | {"format": text}, layer.tensors())


@torch.no_grad()
def test_a_cache_is_for_one_model(model: Any) -> None:
    deeper = tiny_llama(torch.float32, layers=3)
    cache = CompressedCache(model, FORMATS[0])
    with pytest.raises(CacheError, match=r"E-KVC-SHAPE.*2 layers"):
        deeper(ids(5), past_key_values=cache)
    cache = CompressedCache(deeper, FORMATS[0])
    model(ids(5), past_key_values=cache)  # its third layer stays empty
    with pytest.raises(CacheError, match=r"E-KVC-SHAPE.*another model"):
        deeper(ids(5), past_key_values=cache)
    sizes = {"vocab_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    narrow = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_attention_heads=2, num_key_value_heads=1, **sizes)).eval()
    cache = CompressedCache(model, FORMATS[0])
    model(ids(5), past_key_values=cache)
    with pytest.raises(CacheError, match="E-KVC-SHAPE"):
        narrow(ids(1), past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize(("fmt", "dim"), [
    ("kivi(bits=4)", 24), ("kivi(bits=4,group=32,page=32)", 48), ("gear(bits=2)", 24), ("bfp(bits=4,block=32)", 48),
    ("matryoshka(k=20,v=8)", 16), ("gear(bits=2)", 272),
])  # fmt: skip
def test_heads_that_do_not_fit(fmt: str, dim: int) -> None:
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=dim)
    other = LlamaForCausalLM(config).eval()
    with pytest.raises(CacheError, match=r"E-KVC-SHAPE|E-KVC-BASIS"):
        other(ids(4), past_key_values=CompressedCache(other, fmt))


@EACH
@torch.no_grad()
def test_nan_keys_reach_the_output(fmt: str) -> None:
    """A NaN in a key that is packed makes what attends to it NaN, as it would in a dense cache; the other batch row stays a number."""
    broken = tiny_llama(torch.float32)
    cache = CompressedCache(broken, fmt)
    two = ids(140).repeat(2, 1)
    states = []

    def poison(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        states.append(None)
        if out.shape[1] > 1:
            out = out.clone()
            out[1, 3] = torch.nan
        return out

    hook = broken.model.layers[1].self_attn.k_proj.register_forward_hook(poison)
    broken(two, past_key_values=cache)
    y = broken(two[:, :1], past_key_values=cache).logits
    hook.remove()
    assert states and int(cache.compressed[1].lens[1]) > 3
    assert y[1].isnan().any() and y[0].isfinite().all()


def test_tables_and_sizes_that_make_no_sense(model: Any) -> None:
    for fmt, given in (("bfp(bits=4,block=16)", {0: [torch.arange(16)]}), ("matryoshka(k=0.5,v=0.5)", {0: []}), ("kivi", {0: [torch.zeros(3)]})):
        with pytest.raises(CacheError, match=r"E-KVC-BASIS.*takes tables of shapes"):
            model(ids(5), past_key_values=CompressedCache(model, fmt, tables=given))
    for capacity in (0, -3, 1.5, "4k"):
        with pytest.raises(CacheError, match="E-KVC-VALUE"):
            CompressedCache(model, "kivi", capacity)  # type: ignore[arg-type]
    with pytest.raises(CacheError, match=r"(?s)E-KVC-NAME.*EvictingCache"):
        CompressedCache(model, "ems(budget=256)")


@pytest.mark.parametrize(("fmt", "code", "says"), [
    ("kivi(bits=4,page=48,group=48)", "E-KVC-SHAPE", "heads of 64 channels with groups of 48"), ("bfp(block=48)", "E-KVC-SHAPE", "a head of 64 channels"),
    ("matryoshka(k=100,v=full)", "E-KVC-SHAPE", "heads of 64 channels"), ("matryoshka(k=0.5)", "E-KVC-BASIS", "needs a basis"),
    ("bfp(block=0)", "E-KVC-SHAPE", "blocks of 0 channels"), ("gear(page=512)", "E-KVC-SHAPE", "pages of 512 tokens"),
])  # fmt: skip
def test_settings_that_do_not_fit_the_model_are_refused_when_the_cache_is_made(fmt: str, code: str, says: str) -> None:
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2)
    with pytest.raises(CacheError) as caught:
        CompressedCache(config, fmt, 100)
    assert caught.value.code == code and says in caught.value.cause and "heads of 0" not in str(caught.value)
