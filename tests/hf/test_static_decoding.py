"""`effllm.generate(..., compile=...)`: transformers' tokens on static caches, one graph a shape, and models that stay usable."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import effllm
from effllm.errors import OptionError, PromptError
from effllm.hf.slots import Slots, bucket
from effllm.hf.static_decoding import padded
from effllm.hf.steps import Compiled
from effllm.runtime.replay import Replay
from tests.hf.families import tiny
from tests.hf.tiny import tiny_llama, tiny_tokenizer

NEW = 12
FREE: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": []}


def prompts_of(lengths: tuple[int, ...] = (3, 1, 25, 9), seed: int = 1) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 60, (n,), generator=g) for n in lengths]


def theirs(model: Any, prompt: Tensor, **settings: Any) -> list[int]:
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None} | settings
    return model.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], **settings)[0].tolist()


def plain(step: Callable[..., Any]) -> Callable[..., Any]:
    return step


class Counting:
    """torch.compile without code generation; counts graphs, recompilations included."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def backend(gm: Any, _: Any) -> Any:
            self.graphs += 1
            return gm.forward

        return torch.compile(step, fullgraph=True, dynamic=False, backend=backend)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mistral", "gemma2", "qwen2_moe"])
@pytest.mark.parametrize("prefill", [False, True])
def test_greedy_tokens_are_those_of_transformers(family: str, prefill: bool) -> None:
    model, prompts = tiny(family), prompts_of()
    want = [theirs(model, p) for p in prompts]
    how = Compiled(wrap=plain, prefill=prefill)
    assert [o.tolist() for o in effllm.generate(model, prompts, compile=how, **FREE)] == want  # a batch, padded on the left
    assert [effllm.generate(model, [p], compile=how, **FREE)[0].tolist() for p in prompts] == want


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_one_graph_a_shape(family: str) -> None:
    model, prompts, count = tiny(family), prompts_of(), Counting()
    want = [theirs(model, p) for p in prompts]
    for _ in range(2):
        for p, w in zip(prompts, want, strict=True):
            assert effllm.generate(model, [p], compile=count, **FREE)[0].tolist() == w
    assert count.graphs == 1  # prompts of four lengths, two caches
    assert [o.tolist() for o in effllm.generate(model, prompts, compile=count, **FREE)] == want
    with torch.inference_mode():
        assert [o.tolist() for o in effllm.generate(model, prompts, compile=count, **FREE)] == want
    assert count.graphs == 2
    whole = Compiled(wrap=count, prefill=True)
    for p, w in zip(prompts, want, strict=True):
        assert effllm.generate(model, [p], compile=whole, **FREE)[0].tolist() == w
    assert count.graphs == 4  # prompts of 1 to 16 tokens, of 17 to 32; steps are the same graph as before


def test_the_backend_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through Inductor: dense weights as they are, then packed ones by the same call. Dynamo is asked once a call."""
    repeated, real = [], Replay.__call__
    monkeypatch.setattr(Replay, "__call__", lambda self, *values: repeated.append(1) or real(self, *values))
    model, prompts = tiny_llama(torch.float32, layers=1), prompts_of((5, 9))
    assert [o.tolist() for o in effllm.generate(model, prompts[:1], compile=True, **FREE)] == [theirs(model, prompts[0])]
    effllm.compress(model, "w8")  # other modules: other graphs
    want = [o.tolist() for o in effllm.generate(model, prompts, **FREE)]
    repeated.clear()
    assert [effllm.generate(model, [p], compile=True, **FREE)[0].tolist() for p in prompts] == want
    assert len(repeated) == 2 * (NEW - 2)  # the first token comes from the prompt, the second from the step that is recorded


def test_sampling_ends_and_texts_are_those_of_the_other_loop() -> None:
    model, tokenizer = tiny_llama(torch.float32), tiny_tokenizer()
    texts = ["w1 w2 w3", "w9", "w4 w4 w4 w8 w8"]
    settings: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": 20, "seed": 3}
    settings |= {"temperature": 1.2, "top_k": 30, "top_p": 0.95, "repetition_penalty": 1.2}
    want = list(effllm.stream(model, texts, **settings))
    got = list(effllm.stream(model, texts, compile=plain, **settings))
    assert sorted(got, key=lambda e: e.index) == sorted(want, key=lambda e: e.index)
    word = effllm.generate(model, texts, **settings)[0].split()[3]
    cut = [effllm.generate(model, texts, stop=[word], eos_token_id=[5], compile=c, **settings) for c in (None, plain)]
    assert cut[0] == cut[1] and cut[0][0].endswith(word)


def test_a_long_generation_neither_grows_nor_recompiles() -> None:
    model, count, [prompt] = tiny_llama(torch.float32, layers=1), Counting(), prompts_of((7,))
    model.config.max_position_embeddings = 4096
    tokens: list[int] = []
    marks: list[tuple[int, int]] = []
    for event in effllm.stream(model, [prompt], compile=count, max_new_tokens=2000, eos_token_id=[]):
        tokens.append(event.token)
        if len(tokens) in (300, 2000):
            gc.collect()
            marks.append((sum(isinstance(o, Tensor) for o in gc.get_objects()), resident()))
    assert count.graphs == 1 and len(tokens) == 2000
    assert marks[1][0] < marks[0][0] + 20  # tensors that are alive, over 1,700 steps
    assert marks[1][1] - marks[0][1] < 16 << 20  # one copy of the cache a step would be 3 GB
    with torch.no_grad():
        logits = model(input_ids=torch.cat([prompt, torch.tensor(tokens)])[None, :-1], use_cache=False).logits[0, len(prompt) - 1 :]
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert float((logits.max(-1).values - chosen).max()) < 1e-3  # the likeliest at every place, up to ties in fp32


def resident() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096


def test_a_cancelled_stream_leaves_the_model_usable() -> None:
    model, prompts, count = tiny_llama(torch.float32), prompts_of(), Counting()
    want = [theirs(model, p) for p in prompts]
    for taken in (0, 1, 5):
        stream = effllm.stream(model, prompts[2:3], compile=count, **FREE)
        for _ in range(taken):
            next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert effllm.generate(model, prompts[:1], compile=count, **FREE)[0].tolist() == want[0]
    assert theirs(model, prompts[1]) == want[1] and count.graphs == 1


def test_streams_that_take_turns_and_two_models() -> None:
    one, two, prompts, count = tiny_llama(torch.float32), tiny("qwen2"), prompts_of(), Counting()
    want = [theirs(one, prompts[0]), theirs(one, prompts[2]), theirs(two, prompts[3])]
    streams = [effllm.stream(m, [p], compile=count, **FREE) for m, p in ((one, prompts[0]), (one, prompts[2]), (two, prompts[3]))]
    events = [[next(s).token for s in streams] for _ in range(NEW)]
    got = list(zip(*events, strict=True))
    assert [list(g) for g in got] == [w[-NEW:] for w in want]
    assert count.graphs == 2  # one a model


def test_threads() -> None:
    """Two on one model, one on another, all at once, compiling included."""
    one, two, prompts, count = tiny_llama(torch.float32), tiny("qwen2"), prompts_of((3, 14, 25)), Counting()
    work = [(one, prompts[0]), (one, prompts[1]), (two, prompts[2])]
    want = [theirs(m, p) for m, p in work]
    got: list[Any] = [None] * 3

    def run(i: int) -> None:
        got[i] = [effllm.generate(work[i][0], [work[i][1]], compile=count, **FREE)[0].tolist() for _ in range(3)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert got == [[w] * 3 for w in want] and count.graphs == 2


def test_a_prompt_at_capacity() -> None:
    model = tiny_llama(torch.float32)  # 1024 positions
    full, (short,) = torch.randint(3, 60, (1024,), generator=torch.Generator().manual_seed(2)), prompts_of((4,))
    for how in (Compiled(wrap=plain), Compiled(wrap=plain, prefill=True)):
        out = effllm.generate(model, [full, full[:1020], short], compile=how, **FREE)
        assert [len(o) for o in out] == [1025, 1025, 4 + NEW]
        assert out[1].tolist() == theirs(model, full[:1020], max_new_tokens=5) and out[2].tolist() == theirs(model, short)
        assert effllm.generate(model, [full[:1020]], compile=how, **FREE)[0].tolist() == out[1].tolist()
        assert len(effllm.generate(model, [full], compile=how, **FREE)[0]) == 1025
    wide = Compiled(wrap=plain, capacity=4 + NEW - 1)
    assert effllm.generate(model, [short], compile=wide, **FREE)[0].tolist() == theirs(model, short)
    with pytest.raises(PromptError, match="E-PRM-CAPACITY"):
        effllm.generate(model, [short], compile=Compiled(wrap=plain, capacity=4 + NEW - 2), **FREE)


def test_a_prompt_of_several_chunks() -> None:
    model, (prompt,) = tiny_llama(torch.float32), prompts_of((700,))
    assert effllm.generate(model, [prompt], compile=Compiled(wrap=plain, prefill=True), **FREE)[0].tolist() == theirs(model, prompt)


def test_graphs_follow_the_model() -> None:
    """Guards on modules are left out of steps: what they would have seen makes new graphs at the next call."""
    model, (prompt,), count = tiny_llama(torch.float32), prompts_of((5,)), Counting()
    effllm.generate(model, [prompt], compile=count, **FREE)
    with torch.no_grad():  # in place: the same graph reads the new value
        model.model.layers[0].mlp.down_proj.weight.mul_(-1)
    assert effllm.generate(model, [prompt], compile=count, **FREE)[0].tolist() == theirs(model, prompt) and count.graphs == 1
    model.model.layers[1] = copy.deepcopy(model.model.layers[0])
    model.model.layers[1].self_attn.layer_idx = 1
    assert effllm.generate(model, [prompt], compile=count, **FREE)[0].tolist() == theirs(model, prompt) and count.graphs == 2
    model.to(torch.float64)  # keeps the identity of every parameter
    assert effllm.generate(model, [prompt], compile=count, **FREE)[0].tolist() == theirs(model, prompt) and count.graphs == 3


def test_graphs_do_not_keep_a_model_alive() -> None:
    model, (prompt,) = tiny_llama(torch.float32), prompts_of((5,))
    effllm.generate(model, [prompt], compile=Counting(), **FREE)
    gone = weakref.ref(model)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None


def test_slots_go_back_and_close_up() -> None:
    model = tiny_llama(torch.float32)
    cache = Slots(2, 32)
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        before = cache.own[1].keys.clone()
        cache.length = 10
        cache.compact(4, [4, 6, 9])
        assert cache.length == 7 and int(cache.own[0].cumulative_length) == 7
        assert torch.equal(cache.own[1].keys[:, :, :7], before[:, :, [0, 1, 2, 3, 4, 6, 9]])
        cache.seek(5)
        logits = model(input_ids=ids[:, :1], position_ids=torch.tensor([[5]]), past_key_values=cache, use_cache=True).logits
        own = torch.cat([ids[:, [0, 1, 2, 3, 4]], ids[:, :1]], 1)
        assert torch.allclose(logits[0, -1], model(input_ids=own, use_cache=False).logits[0, -1], atol=1e-4)  # nothing of what lies behind is seen
    assert cache.nbytes == 2 * 2 * 2 * 32 * 16 * 4  # layers, keys and values, heads, slots, size, fp32


def test_sizes() -> None:
    assert [bucket(n, 1 << 30) for n in (1, 256, 257, 5000)] == [256, 256, 512, 8192]
    assert bucket(600, 900) == 900 and bucket(901, 900) == 1024 and bucket(100, 128) == 128
    assert [padded(n) for n in (1, 16, 17, 512, 513, 1500)] == [16, 16, 32, 512, 1024, 1536]
    assert Compiled.parse(False) is None and Compiled.parse("w8") == Compiled(recipe="w8")
    assert Compiled.parse({"recipe": "w4", "prefill": True, "layers": "inline"}) == Compiled("w4", True, options=(("layers", "inline"),))


def test_nothing_to_do() -> None:
    model = tiny_llama(torch.float32)
    assert effllm.generate(model, [], compile=plain) == []
    assert [o.tolist() for o in effllm.generate(model, [[4, 5], [6]], max_new_tokens=0, compile=plain)] == [[4, 5], [6]]


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"compile": True, "cache": "kivi(bits=4)"}, "E-OPT-STATIC"), ({"compile": True, "capacity": 64}, "E-OPT-STATIC"), ({"compile": 3}, "E-OPT-COMPILE"),
        ({"compile": "w4+kv:kivi(bits=4)"}, "E-OPT-COMPILE"), ({"compile": {"recipes": "w4"}}, "E-OPT-KEY"), ({"compile": "w44"}, "E-RCP-METHOD"),
        ({"speculative": "chain"}, "E-OPT-DRAFT"),
    ],
)  # fmt: skip
def test_bad_input_has_a_code(settings: dict[str, Any], code: str) -> None:
    with pytest.raises(effllm.EffllmError) as error:
        effllm.generate(tiny_llama(torch.float32), [[1]], **settings)
    assert error.value.code == code


def test_a_model_that_cannot_be_captured_says_so() -> None:
    model = tiny_llama(torch.float32)
    inner = model.model.norm.forward

    def breaking(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return inner(x)

    model.model.norm.forward = breaking
    with pytest.raises(OptionError, match="E-OPT-COMPILE"):
        effllm.generate(model, [[5, 6]], compile=Counting(), **FREE)
