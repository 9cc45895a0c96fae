"""`effllm.generate` and `effllm.stream` against transformers' `generate` of each prompt alone; sampling, stops, streams, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import effllm
from effllm.errors import OptionError, PromptError
from effllm.hf.cache import CompressedCache
from effllm.hf.engine import Engine, Piece
from effllm.hf.sampling import Sampling
from tests.hf.families import tiny
from tests.hf.tiny import tiny_llama, tiny_tokenizer

NEW = 12


def prompts_of(lengths: tuple[int, ...] = (3, 1, 25, 9), seed: int = 1) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 60, (n,), generator=g) for n in lengths]


def theirs(model: Any, prompt: Tensor, seed: int = 0, **settings: Any) -> list[int]:
    torch.manual_seed(seed)
    settings = {"max_new_tokens": NEW, "do_sample": False} | settings
    return model.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], **settings)[0].tolist()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2", "qwen2_moe"])
def test_greedy_tokens_are_those_of_transformers(family: str) -> None:
    model, prompts = tiny(family), prompts_of()
    out = effllm.generate(model, prompts, max_new_tokens=NEW, capacity=30)
    assert [o.tolist() for o in out] == [theirs(model, p) for p in prompts]


def test_sequences_end_at_their_own_eos() -> None:
    model, prompts = tiny_llama(torch.float32), prompts_of((3, 1, 25, 9, 14, 6))
    free = [theirs(model, p, min_new_tokens=NEW)[len(p) :] for p in prompts]
    stops = [free[0][4], free[3][1]]
    out = effllm.generate(model, prompts, max_new_tokens=NEW, eos_token_id=stops)
    want = [theirs(model, p, eos_token_id=stops) for p in prompts]
    assert [o.tolist() for o in out] == want
    assert len({len(w) - len(p) for w, p in zip(want, prompts, strict=True)}) > 2  # they do end at different steps


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.7}, {"temperature": 1.3, "top_k": 7}, {"temperature": 1.0, "top_p": 0.6},
     {"temperature": 0.9, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.4}],
    ids=str,
)  # fmt: skip
def test_sampled_tokens_are_those_of_transformers_after_the_same_seed(settings: dict[str, Any]) -> None:
    model, prompts = tiny_llama(torch.float32), prompts_of()
    seeds = [11, 5, 5, 8]
    out = effllm.generate(model, prompts, max_new_tokens=NEW, seed=seeds, **settings)
    plain = {"top_k": 0} | settings  # transformers' default is 50
    want = [theirs(model, p, seed=s, do_sample=True, **plain) for p, s in zip(prompts, seeds, strict=True)]
    assert [o.tolist() for o in out] == want
    assert [o.tolist() for o in effllm.generate(model, prompts, max_new_tokens=NEW, seed=[1, 2, 3, 4], **settings)] != want


def test_a_penalty_works_greedily_too() -> None:
    model, prompts = tiny_llama(torch.float32), prompts_of()
    out = effllm.generate(model, prompts, max_new_tokens=NEW, repetition_penalty=1.8)
    assert [o.tolist() for o in out] == [theirs(model, p, repetition_penalty=1.8) for p in prompts]
    assert [o.tolist() for o in out] != [theirs(model, p) for p in prompts]


def test_draws_of_a_sequence_do_not_depend_on_the_others() -> None:
    model, prompts = tiny_llama(torch.float32), prompts_of()
    together = effllm.generate(model, prompts, max_new_tokens=NEW, temperature=1.0, seed=[3, 4, 5, 6])
    for i, p in enumerate(prompts):
        assert torch.equal(effllm.generate(model, [p], max_new_tokens=NEW, temperature=1.0, seed=[3 + i])[0], together[i])
    assert torch.equal(effllm.generate(model, prompts, max_new_tokens=NEW, temperature=1.0, seed=3)[2], together[2])  # seed + index


def test_probabilities_follow_their_definitions() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    p = Sampling(temperature=0.5).probabilities(logits)
    assert torch.allclose(p, (logits * 2).softmax(0))
    k = Sampling(temperature=1.0, top_k=5).probabilities(logits)
    assert (k > 0).sum() == 5 and set(k.nonzero()[:, 0].tolist()) == set(logits.topk(5).indices.tolist())
    top = Sampling(temperature=1.0, top_p=0.7).probabilities(logits)
    whole, order = logits.softmax(0), logits.argsort(descending=True)
    need = int((whole[order].cumsum(0) < 0.7).sum()) + 1  # the fewest that reach 0.7
    assert set(top.nonzero()[:, 0].tolist()) == set(order[:need].tolist())
    assert (Sampling(temperature=1.0, top_p=1e-6).probabilities(logits) > 0).sum() == 1
    stream, three = torch.Generator().manual_seed(1), Sampling(temperature=1.0, top_k=3)
    counts = torch.bincount(torch.tensor([three.choose(logits, order, stream) for _ in range(2000)]), minlength=50)
    want = three.probabilities(logits) * 2000
    assert ((counts - want).abs() <= 5 * want.sqrt()).all()  # five standard deviations


def test_texts_in_texts_out_and_stop_texts() -> None:
    model, tokenizer = tiny_llama(torch.float32), tiny_tokenizer()
    texts = ["w1 w2 w3", "w9", "w4 w4 w4 w8 w8"]
    out = effllm.generate(model, texts, tokenizer=tokenizer, max_new_tokens=NEW)
    for text, got in zip(texts, out, strict=True):
        ids = torch.tensor(tokenizer(text)["input_ids"])
        assert got == tokenizer.decode(theirs(model, ids)[len(ids) :], skip_special_tokens=True)
    word = out[0].split()[3]
    cut = effllm.generate(model, texts, tokenizer=tokenizer, max_new_tokens=NEW, stop=[word])
    assert cut[0] == out[0][: out[0].index(word) + len(word)]


def test_a_stream_tells_everything_once_and_in_order() -> None:
    model, tokenizer = tiny_llama(torch.float32), tiny_tokenizer()
    texts = ["w1 w2 w3", "w9", "w4 w4 w4 w8 w8"]
    events = list(effllm.stream(model, texts, tokenizer=tokenizer, max_new_tokens=5))
    whole = effllm.generate(model, texts, tokenizer=tokenizer, max_new_tokens=5)
    for i in range(3):
        mine = [e for e in events if e.index == i]
        assert "".join(e.text for e in mine) == whole[i]
        assert [bool(e.done) for e in mine] == [False] * (len(mine) - 1) + [True]


def test_a_stream_that_is_dropped_leaves_the_model_as_it_was() -> None:
    model, prompts = tiny_llama(torch.float32), prompts_of()
    want = theirs(model, prompts[0])
    stream = effllm.stream(model, prompts, max_new_tokens=NEW)
    for _ in range(6):
        next(stream)
    assert model.config._attn_implementation == "sdpa" and theirs(model, prompts[0]) == want  # between two tokens, too
    other = effllm.stream(model, prompts[:2], max_new_tokens=NEW)  # and two streams take turns
    tokens = [next(other).token, next(stream), next(other).token, next(stream), next(other).token][::2]
    stream.close()
    assert tokens == [effllm.generate(model, prompts[:2], max_new_tokens=2)[i].tolist()[-2 + j] for i, j in ((0, 0), (1, 0), (0, 1))]
    assert theirs(model, prompts[0]) == want


def test_a_prompt_at_capacity() -> None:
    model = tiny_llama(torch.float32)  # 1024 positions
    full, (short,) = torch.randint(3, 60, (1024,), generator=torch.Generator().manual_seed(2)), prompts_of((4,))
    out = effllm.generate(model, [full, full[:1020], short], max_new_tokens=NEW, eos_token_id=[])
    assert [len(o) for o in out] == [1025, 1025, 4 + NEW]
    assert out[1].tolist() == theirs(model, full[:1020], max_new_tokens=5, eos_token_id=None) and out[2].tolist() == theirs(model, short, eos_token_id=None)
    with pytest.raises(PromptError, match="E-PRM-CAPACITY"):
        effllm.generate(model, [torch.cat([full, short])], max_new_tokens=1)


def test_nothing_to_do() -> None:
    model = tiny_llama(torch.float32)
    assert effllm.generate(model, []) == []
    assert [o.tolist() for o in effllm.generate(model, [[4, 5], [6]], max_new_tokens=0)] == [[4, 5], [6]]


@pytest.mark.parametrize(
    ("prompts", "settings", "code"),
    [
        ([[1], []], {}, "E-PRM-EMPTY"), ([["x"]], {}, "E-PRM-IDS"), (["text"], {}, "E-OPT-TOKENIZER"), ("text", {"tokenizer": 1}, "E-OPT-PROMPTS"),
        (torch.tensor([1, 2]), {}, "E-OPT-PROMPTS"), ([[1]], {"stop": "x"}, "E-OPT-TOKENIZER"), ([[1]], {"max_new_tokens": -1}, "E-OPT-VALUE"),
        ([[1]], {"temperature": -1.0}, "E-OPT-SAMPLING"), ([[1]], {"temperature": float("nan")}, "E-OPT-SAMPLING"), ([[1]], {"top_k": 5}, "E-OPT-SAMPLING"),
        ([[1]], {"temperature": 1.0, "top_p": 0.0}, "E-OPT-SAMPLING"), ([[1]], {"repetition_penalty": 0.0}, "E-OPT-SAMPLING"),
        ([[1]], {"temperature": 1.0, "seed": [1, 2]}, "E-OPT-SAMPLING"), ([[1, 2, 3]], {"capacity": 2}, "E-PRM-CAPACITY"),
        ([[64]], {}, "E-PRM-IDS"), ([[-1]], {}, "E-PRM-IDS"),
    ],
)  # fmt: skip
def test_bad_input_has_a_code(prompts: Any, settings: dict[str, Any], code: str) -> None:
    with pytest.raises(effllm.EffllmError) as error:
        effllm.generate(tiny_llama(torch.float32), prompts, **settings)
    assert error.value.code == code and isinstance(error.value, (OptionError, PromptError))


def test_a_cache_per_sequence_is_filled_once_its_prompt_is_complete() -> None:
    model, prompts = tiny("mistral"), prompts_of((3, 25, 9, 14))
    made: list[DynamicCache] = []

    def make() -> DynamicCache:
        made.append(DynamicCache(config=model.config))
        return made[-1]

    out = effllm.generate(model, prompts, max_new_tokens=NEW, capacity=30, cache=make)
    assert [o.tolist() for o in out] == [theirs(model, p) for p in prompts]
    assert len(made) == 4 and sorted(c.get_seq_length() for c in made) == sorted(len(o) - 1 for o in out)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_its_rows(side: str) -> None:
    """A left-padded batch gives what transformers gives for it; padding on the right, which transformers gets wrong, the same."""
    model, prompts = tiny_llama(torch.float32), prompts_of((3, 25, 9))
    ids, mask = torch.zeros(3, 25, dtype=torch.int64), torch.zeros(3, 25, dtype=torch.int64)
    for i, p in enumerate(prompts):
        at = slice(25 - len(p), 25) if side == "left" else slice(0, len(p))
        ids[i, at], mask[i, at] = p, 1
    out = effllm.generate(model, ids, attention_mask=mask, max_new_tokens=NEW, eos_token_id=[])
    assert [o.tolist() for o in out] == [theirs(model, p, eos_token_id=None) for p in prompts]
    if side == "left":
        padded = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert [o.tolist()[len(p) :] for o, p in zip(out, prompts, strict=True)] == padded[:, 25:].tolist()
    mask[1, 12] = 0
    with pytest.raises(OptionError, match="E-OPT-MASK"):
        effllm.generate(model, ids, attention_mask=mask)
    with pytest.raises(OptionError, match="E-OPT-MASK"):
        effllm.generate(model, prompts, attention_mask=mask)


def test_a_cache_by_its_format() -> None:
    model, prompts = tiny_llama(torch.float32), prompts_of((40, 5))
    spec = "kivi(bits=2,page=16,window=0,group=16)"
    by_name = effllm.generate(model, prompts, max_new_tokens=NEW, cache=spec)
    assert [o.tolist() for o in by_name] == [theirs(model, p, past_key_values=CompressedCache(model, spec)) for p in prompts]
    with pytest.raises(effllm.EffllmError, match="E-KVC-NAME"):
        effllm.generate(model, prompts, cache="kivy")


@pytest.mark.parametrize("spec", ["kivi(bits=8,page=16,window=16,group=16)", "kivi(bits=2,page=16,window=0,group=16)"])
def test_compressed_caches_are_those_of_transformers_generate_with_the_same_cache(spec: str) -> None:
    model, prompts = tiny_llama(torch.float32), prompts_of((40, 70, 5, 33))
    out = effllm.generate(model, prompts, max_new_tokens=NEW, cache=lambda: CompressedCache(model, spec))
    want = [theirs(model, p, past_key_values=CompressedCache(model, spec)) for p in prompts]
    assert [o.tolist() for o in out] == want


def test_a_row_goes_on_in_transformers() -> None:
    model, prompts = tiny("mistral"), prompts_of((3, 25, 9))
    engine = Engine(model, 60)
    rows = [engine.open(len(p)) for p in prompts]
    logits = engine.run([Piece(r, p) for r, p in zip(rows, prompts, strict=True)])
    for prompt, row, scores in zip(prompts, rows, logits, strict=True):
        cache = engine.export(row)
        ids = torch.cat([prompt, scores.argmax()[None]])
        assert model.generate(ids[None], past_key_values=cache, max_new_tokens=NEW - 1, do_sample=False)[0].tolist() == theirs(model, prompt)
