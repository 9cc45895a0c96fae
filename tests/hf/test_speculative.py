"""`effllm.generate(..., draft=...)`: the tokens of the model alone, the distribution of the model alone, whatever the draft."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import effllm
from effllm.errors import OptionError, PromptError
from effllm.hf.acceptance import examples, train_acceptance
from effllm.hf.draft import compressed, draft_of, extra_bytes, lowered
from effllm.hf.request import Request
from effllm.hf.speculative import Statistics
from effllm.runtime.packed import packed_weights
from effllm.runtime.speculation.head import AcceptanceHead
from effllm.runtime.speculation.settings import Speculation
from tests.hf.families import shallow, tiny
from tests.hf.test_static_decoding import FREE, Counting, prompts_of, theirs
from tests.hf.tiny import tiny_llama, tiny_tokenizer
from tests.runtime.speculation.chi import LIMIT, deviation

SHAPES = ["chain(tokens=4)", "chain(tokens=6, stop=0.5)", "constant(branching=3x2x1)", "beam(width=4, depth=3)"]


def near(model: Any, noise: float = 0.02) -> Any:
    """A draft: the model with noise on its weights."""
    draft, stream = copy.deepcopy(model), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in draft.parameters():
            p.add_(noise * torch.randn(p.shape, generator=stream).to(p.dtype))
    return draft


def ids_of(model: Any, prompts: list[Tensor], **settings: Any) -> list[list[int]]:
    return [o.tolist() for o in effllm.generate(model, prompts, **settings)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mistral", "gemma2", "qwen2_moe"])
def test_greedy_tokens_are_those_of_transformers(family: str) -> None:
    """Chains and trees; caches with windows; a draft that is right now and then."""
    model, prompts = tiny(family), prompts_of()
    want, draft = [theirs(model, p) for p in prompts], near(model)
    for shape in SHAPES:
        counts = Statistics()
        assert ids_of(model, prompts, draft=draft, speculative=shape, statistics=counts, **FREE) == want, shape
        assert counts.accepted > 0 and (family == "gemma2" or counts.accepted < counts.drafted)  # its cap on logits makes it stubborn


def test_trees_with_the_eager_attention() -> None:
    model, prompts = tiny("llama"), prompts_of()
    draft = near(model)
    model.set_attn_implementation("eager")
    draft.set_attn_implementation("eager")
    for shape in SHAPES[2:]:
        assert ids_of(model, prompts, draft=draft, speculative=shape, **FREE) == [theirs(model, p) for p in prompts]


@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_greedy_tokens(shape: str) -> None:
    model, prompts, count = shallow("llama"), prompts_of(), Counting()
    want, draft = [theirs(model, p) for p in prompts], near(model)
    assert ids_of(model, prompts, draft=draft, speculative=shape, compile=count, **FREE) == want
    graphs = count.graphs
    assert ids_of(model, prompts, draft=draft, speculative=shape, compile=count, **FREE) == want
    assert count.graphs == graphs <= 5


def test_a_perfect_draft_and_a_useless_one() -> None:
    model, prompts = tiny("llama"), prompts_of()
    want = [theirs(model, p) for p in prompts]
    same, other = Statistics(), Statistics()
    assert ids_of(model, prompts, draft=model, statistics=same, **FREE) == want
    assert same.acceptance == 1 and same.rounds == 4 * 3  # one token from the prompt, then 5 + 5 + 1
    assert ids_of(model, prompts, draft=near(model, 10.0), statistics=other, **FREE) == want
    assert other.tokens_per_round < 1.5


def cramped() -> tuple[Any, Any]:
    """A model of six tokens, and a draft that differs from it a lot."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=6, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            max_position_embeddings=64, initializer_range=0.3, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )
    ).eval()  # fmt: skip
    return model, near(model, 0.1)


@torch.no_grad()
def joint(model: Any, prompt: Tensor, settings: dict[str, Any]) -> Tensor:
    """The model's own distribution (6, 6) of the second and the third new token, by enumeration."""
    sampling, out = Request(model, [prompt], **settings).sampling, torch.zeros(6, 6, dtype=torch.float64)

    def after(more: list[int]) -> Tensor:
        ids = torch.cat([prompt, torch.tensor(more, dtype=torch.int64)])
        return sampling.probabilities(sampling.penalize(model(input_ids=ids[None]).logits[0, -1], ids)).double()

    first = after([])
    for a in range(6):
        second = after([a]) if first[a] > 0 else first
        for b in range(6):
            if first[a] * second[b] > 0:
                out[b] += first[a] * second[b] * after([a, b])
    return out


@pytest.mark.parametrize(
    ("shape", "settings", "own"),
    [
        ("chain(tokens=2)", {"temperature": 1.0}, True),
        ("chain(tokens=3, stop=0.6)", {"temperature": 1.3, "top_k": 4, "repetition_penalty": 1.3}, True),
        ("constant(branching=2x2)", {"temperature": 0.8, "top_p": 0.9}, True),
        ("beam(width=3, depth=2)", {"temperature": 1.0, "top_k": 4}, True),
        ("beam(width=3, depth=2)", {"temperature": 1.0}, False),
    ],
)
def test_draws_are_distributed_as_those_of_the_model(shape: str, settings: dict[str, Any], own: bool) -> None:
    """A draft with a cache of its own, and one made of the model, which shares the model's."""
    model, other = cramped()
    prompt, n = torch.tensor([1, 4, 2]), 450
    draft: Any = other if own else "bipolar(bits=2, group=16)"
    counts, statistics = torch.zeros(6, 6), Statistics()
    for out in effllm.generate(model, [prompt] * n, draft=draft, speculative=shape, max_new_tokens=4, seed=11, statistics=statistics, **settings):
        counts[out[4], out[5]] += 1
    want = joint(model, prompt, settings)
    assert float(want.sum()) == pytest.approx(1, abs=1e-5)
    assert deviation(counts, want) < LIMIT
    assert 0.15 < statistics.acceptance < 0.9
    assert deviation(counts, joint(draft_of(model, draft), prompt, settings)) > LIMIT  # the test tells model and draft apart


def test_a_seed_gives_the_same_draws_again() -> None:
    model, prompts = tiny("llama"), prompts_of()
    settings: dict[str, Any] = FREE | {"draft": near(model), "speculative": SHAPES[2], "temperature": 1.0}
    once = ids_of(model, prompts, seed=[1, 2, 3, 4], **settings)
    assert once == ids_of(model, prompts, seed=[1, 2, 3, 4], **settings) != ids_of(model, prompts, seed=[5, 6, 7, 8], **settings)
    assert ids_of(model, prompts[2:3], seed=[3], **settings) == once[2:3]  # and does not depend on the others


def test_ends_penalties_and_texts() -> None:
    model, tokenizer = tiny_llama(torch.float32), tiny_tokenizer()
    draft, texts = near(model, 0.01), ["w1 w2 w3", "w9", "w4 w4 w4 w8 w8"]
    settings: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": 20, "repetition_penalty": 1.8}
    plain = effllm.generate(model, texts, **settings)
    ends = [tokenizer(plain[0])["input_ids"][4], tokenizer(plain[2])["input_ids"][1]]
    word = plain[1].split()[5]
    for more in ({}, {"eos_token_id": ends}, {"stop": [word]}):
        want = list(effllm.stream(model, texts, **settings, **more))
        for shape in SHAPES:
            got = list(effllm.stream(model, texts, draft=draft, speculative=shape, **settings, **more))
            assert got == sorted(want, key=lambda e: e.index)


def test_where_positions_end() -> None:
    model = shallow("gpt2")  # 128 learned positions: one more is an error
    draft, g, compiled = near(model), torch.Generator().manual_seed(3), Counting()
    for length in (120, 126, 127, 128):
        prompt = torch.randint(3, 60, (length,), generator=g)
        want = ids_of(model, [prompt], **FREE)
        assert len(want[0]) == min(length + FREE["max_new_tokens"], 129)
        for shape in SHAPES:
            assert ids_of(model, [prompt], draft=draft, speculative=shape, **FREE) == want
        for shape in SHAPES[::3]:  # rows that fill up a graph stay within the positions, too
            assert ids_of(model, [prompt], draft=draft, speculative=shape, compile=compiled, **FREE) == want


def test_a_cancelled_stream_and_streams_that_take_turns() -> None:
    model, prompts = tiny("llama"), prompts_of()
    settings: dict[str, Any] = FREE | {"draft": near(model)}
    want = [theirs(model, p)[-12:] for p in prompts]
    dropped = effllm.stream(model, prompts, **settings)
    for _ in range(5):
        next(dropped)
    dropped.close()  # type: ignore[attr-defined]
    one, two = (effllm.stream(model, [p], **settings) for p in prompts[1:3])
    turns = [(next(one).token, next(two).token) for _ in range(12)]
    assert [list(t) for t in zip(*turns, strict=True)] == want[1:3]


def test_a_model_drafts_for_itself_at_fewer_bits() -> None:
    model, prompts = tiny_llama(torch.float32), prompts_of()
    effllm.compress(model, "w8")
    draft = lowered(model, 4)
    want = {n: 4 if w.bits == 8 and "layers" in n else w.bits for n, w in packed_weights(model).items()}
    assert {n: w.bits for n, w in packed_weights(draft).items()} == want and set(want.values()) == {4, 8}
    shared = {id(t) for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None}
    for name, p in draft.named_parameters():
        assert id(p) in shared or "layers" in name
    extra = sum(t.numel() * t.element_size() for n, w in packed_weights(draft).items() if "layers" in n for t in w.tensors().values())
    assert extra_bytes(model, draft) == extra < 0.65 * sum(w.nbytes for n, w in packed_weights(model).items() if "layers" in n)
    for name, w in packed_weights(draft).items():  # the planes are the model's own
        whole = packed_weights(model)[name].packed()
        assert torch.equal(w.packed().tensors["planes"], whole.tensors["planes"][: w.bits])
    assert draft_of(model, 4) is draft_of(model, 4) is not draft_of(model, 3)
    statistics, plain, count = Statistics(), ids_of(model, prompts, **FREE), Counting()
    assert ids_of(model, prompts, draft=4, statistics=statistics, **FREE) == plain
    assert statistics.acceptance > 0.2
    for shape in SHAPES:  # it writes behind the model's keys and values, and the model over them
        assert ids_of(model, prompts, draft=4, speculative=shape, **FREE) == plain
    assert ids_of(model, prompts, draft=4, compile=count, **FREE) == plain
    assert count.graphs == 2  # one token of the draft, five of the model: no prompt, no catching up
    with pytest.raises(OptionError, match="E-OPT-DRAFT"):
        lowered(model, 8)


def test_a_dense_model_drafts_by_a_recipe() -> None:
    model, prompts = tiny_llama(torch.float32), prompts_of()
    want, weights = [theirs(model, p) for p in prompts], {n: id(p) for n, p in model.named_parameters()}
    draft = compressed(model, "w8")
    assert packed_weights(draft) and not packed_weights(model) and {n: id(p) for n, p in model.named_parameters()} == weights
    statistics = Statistics()
    assert ids_of(model, prompts, draft="w8", statistics=statistics, **FREE) == want and statistics.acceptance > 0.6
    held = draft_of(model, "w8")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(0.5)
    assert draft_of(model, "w8") is not held  # it was made of other weights


def test_a_head_learns_what_is_accepted() -> None:
    """Hidden states say which token was drafted; here every third token of the vocabulary is rejected."""
    draft = tiny("phi")
    model = copy.deepcopy(draft)
    with torch.no_grad():
        model.lm_head.bias[::3] -= 8
    windows = torch.randint(3, 83, (16, 100), generator=torch.Generator().manual_seed(0))
    x, y = examples(model, draft, torch.randint(3, 83, (100,), generator=torch.Generator().manual_seed(9)), 1.0, 0.15, torch.Generator().manual_seed(5))
    assert 0.75 * 99 < len(x) < 0.95 * 99 and float(y.min()) < 0.01 and float(y.max()) == 1
    spread = float((y.mean() - y).square().mean())
    errors = [float((train_acceptance(model, draft, windows, epochs=n, rejection_weight=1.0, seed=1)(x) - y).square().mean()) for n in (1, 30)]
    assert errors[1] < 0.25 * spread < 0.5 * errors[0]  # and it does so by training
    even, shy = (train_acceptance(model, draft, windows, rejection_weight=w, seed=1)(x).mean() for w in (1.0, 6.0))
    assert float(shy) < float(even) - 0.1  # a rejection weighs more
    greedy = examples(model, draft, windows[0], 0.0, 0.0, torch.Generator())[1]
    assert set(greedy.tolist()) == {0.0, 1.0} and len(greedy) == 99


def test_a_head_decides_how_long_chains_are() -> None:
    model, prompts = tiny("llama"), prompts_of()
    want, draft, drafted = [theirs(model, p) for p in prompts], near(model), []
    for bias in (-20.0, 0.0, 20.0):
        head = AcceptanceHead(64, layers=1)
        torch.nn.init.zeros_(head.out.weight)
        with torch.no_grad():
            head.out.bias.copy_(torch.tensor([0.0, bias]))
        counts = Statistics()
        how = Speculation("chain", tokens=6, least=1, stop=0.6, head=head)
        assert ids_of(model, prompts, draft=draft, speculative=how, statistics=counts, **FREE) == want
        drafted.append(counts.drafted / counts.rounds)
    # estimates come one token late: at 0 the second token ends the chain, at 1/2 (survival 1/4 after two) the third, at 1 nothing
    assert drafted[0] <= 2 < drafted[1] <= 3 < drafted[2]


def test_other_limits() -> None:
    model = tiny("llama")
    with pytest.raises(OptionError, match="E-OPT-DRAFT"):
        effllm.generate(model, [[5]], draft=tiny_llama(torch.float32))  # another vocabulary
    with pytest.raises(OptionError, match="E-OPT-DRAFT"):
        effllm.generate(model, [[5]], draft=4)  # nothing is packed
    with pytest.raises(OptionError, match="E-OPT-SPECULATION"):
        effllm.generate(model, [[5]], draft=model, speculative="chain(tokens=0)")
    with pytest.raises(PromptError, match="E-PRM-MODEL"):
        effllm.generate(tiny("bert"), [[5]], draft=tiny("bert"))
    other = copy.deepcopy(model)
    other.config._attn_implementation = "flash_attention_2"
    with pytest.raises(PromptError, match="E-PRM-ATTENTION"):
        effllm.generate(other, [[5]], draft=model, speculative="beam")
    with pytest.raises(OptionError, match="E-OPT-VALUE"):
        train_acceptance(model, model, torch.zeros(3, dtype=torch.int64))
    assert effllm.generate(model, [[5]], draft=model, max_new_tokens=0)[0].tolist() == [5] and effllm.generate(model, [], draft=model) == []


@pytest.fixture(scope="module")
def packed() -> tuple[Any, list[Tensor], list[list[int]]]:
    """A packed model, prompts and its tokens. Shapes share the model, and with it the graph of the draft."""
    model, prompts = tiny_llama(torch.float32), prompts_of((5, 9))
    effllm.compress(model, "w8")
    return model, prompts, ids_of(model, prompts, **FREE)


def test_two_rows_through_the_backend(packed: tuple[Any, list[Tensor], list[list[int]]]) -> None:
    """Padded on the left."""
    model, prompts, want = packed
    assert ids_of(model, prompts, compile={"inner": "eager"}, **FREE) == want


@pytest.mark.parametrize("shape", ["chain(tokens=2)", "chain(tokens=6, stop=0.5)", "constant(branching=2x1)", "beam(width=2, depth=2)"])
def test_through_the_backend(packed: tuple[Any, list[Tensor], list[list[int]]], shape: str) -> None:
    """Its passes make one program of steps of one and of several rows; Inductor would add nothing but time."""
    model, prompts, want = packed
    assert ids_of(model, prompts, draft=4, speculative=shape, compile={"inner": "eager"}, **FREE) == want
