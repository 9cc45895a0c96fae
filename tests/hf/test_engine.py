"""Packed and chunked forwards against runs of each sequence alone: logits, cached keys and values, families, refusals."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from effllm import backend
from effllm.compression import compress
from effllm.errors import PromptError
from effllm.hf import engine as engines
from effllm.hf.engine import Engine, Piece
from effllm.runtime.prepack import prepack
from tests.hf.families import FAMILIES, tiny
from tests.hf.tiny import tiny_llama

LENGTHS = (5, 1, 17, 12, 30)
# fp32 sums of other lengths in another order, through two layers, on logits of size 5
CLOSE = 5e-5


def prompts_of(lengths: tuple[int, ...] = LENGTHS, vocabulary: int = 60) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocabulary, (n,), generator=g) for n in lengths]


@torch.no_grad()
def alone(model, prompt: Tensor) -> tuple[Tensor, DynamicCache]:
    cache = DynamicCache()  # without sliding layers: keeps every key
    return model(prompt[None], past_key_values=cache).logits[0, -1], cache


def keys_equal(engine: Engine, row, cache: DynamicCache) -> None:
    for layer, theirs in enumerate(cache.layers):
        for ours, want in zip(engine.cache.read(layer, row.start, row.length), (theirs.keys, theirs.values), strict=True):
            torch.testing.assert_close(ours, want, rtol=0, atol=CLOSE)


GENERATES = sorted(set(FAMILIES) - {"bert"})


@pytest.mark.parametrize("family", GENERATES)
def test_packed_prompts_are_the_single_runs(family: str) -> None:
    model, prompts = tiny(family), prompts_of()
    packing = prepack(prompts, capacity=40)
    assert len(packing.bins) == 2  # two forwards
    engine = Engine(model, sum(LENGTHS) + 8 * len(LENGTHS))
    rows = [engine.open(len(p) + 8) for p in prompts]
    logits = torch.empty(len(prompts), model.config.vocab_size)
    for members in packing.bins:
        logits[list(members)] = engine.run([Piece(rows[i], prompts[i]) for i in members])
    singles = [alone(model, p) for p in prompts]
    assert (logits - torch.stack([s[0] for s in singles])).abs().max() < CLOSE
    for row, (_, cache) in zip(rows, singles, strict=True):
        keys_equal(engine, row, cache)
    for _ in range(3):  # decoding past the sliding windows
        tokens = logits.argmax(-1)
        prompts = [torch.cat([p, t[None]]) for p, t in zip(prompts, tokens, strict=True)]
        logits = engine.run([Piece(r, t[None]) for r, t in zip(rows, tokens, strict=True)])
        assert (logits - torch.stack([alone(model, p)[0] for p in prompts])).abs().max() < CLOSE


@pytest.mark.parametrize("splits", [(30,), (1, 29), (7, 8, 15), (29, 1), tuple([1] * 30)], ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_chunks_are_the_whole_prompt(family: str, splits: tuple[int, ...]) -> None:
    model, (prompt, other) = tiny(family), prompts_of((30, 9))
    engine = Engine(model, 100)
    row, beside = engine.open(31), engine.open(40)
    at = 0
    for n in splits:  # a sequence that decodes beside every chunk
        logits = engine.run([Piece(beside, other if not at else other[-1:], logits=False), Piece(row, prompt[at : at + n])])
        at += n
    want, cache = alone(model, prompt)
    assert logits.shape[0] == 1 and (logits[0] - want).abs().max() < CLOSE
    keys_equal(engine, row, cache)


def test_positions_that_go_on_would_show() -> None:
    # rotary products are the same for shifted positions, the cached keys are not: the check above can fail
    model, prompts = tiny_llama(torch.float32), prompts_of((6, 7))
    with torch.no_grad():
        cache = DynamicCache()
        model(torch.cat(prompts)[None], past_key_values=cache)
    engine = Engine(model, 20)
    rows = [engine.open(len(p)) for p in prompts]
    engine.run([Piece(r, p) for r, p in zip(rows, prompts, strict=True)])
    wrong = cache.layers[0].keys[:, :, 6:] - engine.cache.read(0, rows[1].start, 7)[0]
    assert wrong.abs().max() > 100 * CLOSE


def test_padding_tokens_change_nothing() -> None:
    model, prompts = tiny_llama(torch.float32), prompts_of()
    plain, padded = Engine(model, 70), Engine(model, 70, pad_to=lambda n: 128)
    outs = []
    for engine in (plain, padded):
        rows = [engine.open(len(p) + 1) for p in prompts]
        first = engine.run([Piece(r, p) for r, p in zip(rows, prompts, strict=True)])
        outs.append((first, engine.run([Piece(r, torch.tensor([9])) for r in rows])))
    for a, b in zip(*outs, strict=True):
        assert (a - b).abs().max() < CLOSE


def test_a_row_that_moves_keeps_its_keys() -> None:
    model, prompts = tiny_llama(torch.float32), prompts_of((6, 7, 3))
    engine = Engine(model, 40)
    rows = [engine.open(len(p)) for p in prompts]
    engine.run([Piece(r, p) for r, p in zip(rows, prompts, strict=True)])
    before = [engine.cache.read(1, r.start, r.length)[0].clone() for r in rows]
    assert engine.grow(rows[0], 12) and rows[0].start == 16 and engine.free == 40 - 22
    assert engine.grow(rows[2], 3) and rows[2].start == 13  # nothing to do
    assert not engine.grow(rows[1], 30) and rows[1].capacity == 7
    for row, keys in zip(rows, before, strict=True):
        assert torch.equal(engine.cache.read(1, row.start, row.length)[0], keys)


def test_past_the_capacity_nothing_is_written() -> None:
    model = tiny_llama(torch.float32)
    engine = Engine(model, 2000)
    row, long = engine.open(4), engine.open(1100)
    engine.run([Piece(row, torch.tensor([5, 6, 7]))])
    for piece in (Piece(row, torch.tensor([1, 2])), Piece(long, torch.zeros(1025, dtype=torch.int64))):
        with pytest.raises(PromptError, match="E-PRM-CAPACITY"):
            engine.run([piece])
    assert row.length == 3 and long.length == 0 and engine.open(1000) is None


@pytest.mark.parametrize("compiled", ["wrapped", "in place"])
def test_compiled_models_run_without_recompiling_each_step(compiled: str) -> None:
    torch._dynamo.reset()
    model, prompts = tiny_llama(torch.float32), prompts_of()
    want = [alone(model, p)[0] for p in prompts]
    count = 0

    def counting(gm, inputs):
        nonlocal count
        count += 1
        return gm.forward

    if compiled == "wrapped":
        model = torch.compile(model, backend=counting, fullgraph=True, dynamic=True)
    else:
        model.compile(backend=counting, fullgraph=True, dynamic=True)
    engine = Engine(model, 300)
    rows = [engine.open(len(p) + 9) for p in prompts]
    for _ in range(2):  # the first forward proves in eager mode that attention goes through the registry
        for r in rows:
            r.length = 0
        logits = engine.run([Piece(r, p) for r, p in zip(rows, prompts, strict=True)])
    assert count == 1 and (logits - torch.stack(want)).abs().max() < CLOSE
    for step in range(6):
        engine.run([Piece(r, torch.tensor([5])) for r in rows[: 5 - step // 2]])
    assert count <= 3


def test_packed_weights_through_the_backend() -> None:
    torch._dynamo.reset()
    backend.reports.clear()
    model, prompts = tiny_llama(torch.float32), prompts_of()
    compress(model, "w8")
    compiled = torch.compile(model, backend="effllm", options={"inner": "eager"}, dynamic=True)
    engine, plain = Engine(compiled, 100), Engine(model, 100)
    outs = []
    for e in (engine, plain):
        rows = [e.open(len(p) + 2) for p in prompts]
        e.run([Piece(r, p) for r, p in zip(rows, prompts, strict=True)])
        outs.append([e.run([Piece(r, torch.tensor([7])) for r in rows]) for _ in range(2)])
    assert backend.reports
    for a, b in zip(*outs, strict=True):
        assert (a - b).abs().max() < CLOSE


def test_the_model_is_as_before_after_a_failure_and_beside_other_threads() -> None:
    model, (prompt,) = tiny_llama(torch.float32), prompts_of((9,))
    want, _ = alone(model, prompt)
    engine = Engine(model, 20)
    row = engine.open(12)
    hook = model.model.layers[1].register_forward_pre_hook(lambda *a: (_ for _ in ()).throw(ValueError("no")))
    with pytest.raises(ValueError, match="no"):
        engine.run([Piece(row, prompt)])
    hook.remove()
    assert row.length == 0 and model.config._attn_implementation == "sdpa" and torch.equal(alone(model, prompt)[0], want)
    assert (engine.run([Piece(row, prompt)])[0] - want).abs().max() < CLOSE

    inside, go, seen = threading.Event(), threading.Event(), []

    def pause(*_) -> None:
        if threading.current_thread() is worker:
            inside.set()
            go.wait(20)

    gate = model.model.layers[1].register_forward_pre_hook(pause)
    worker = threading.Thread(target=lambda: seen.append(engine.run([Piece(engine.open(5), prompt[:5])])))
    worker.start()
    assert inside.wait(20) and model.config._attn_implementation == "effllm+sdpa"
    assert torch.equal(alone(model, prompt)[0], want)  # somebody else's forward, meanwhile
    mine = Engine(model, 20)
    assert (mine.run([Piece(mine.open(9), prompt)])[0] - want).abs().max() < CLOSE
    assert model.config._attn_implementation == "effllm+sdpa"  # the other one is still inside
    go.set()
    worker.join()
    gate.remove()
    assert model.config._attn_implementation == "sdpa" and (seen[0][0] - alone(model, prompt[:5])[0]).abs().max() < CLOSE


def test_what_cannot_share_a_forward_is_refused() -> None:
    bert = tiny("bert")
    with pytest.raises(PromptError, match="no head that generates"):
        Engine(bert, 10)
    with pytest.raises(PromptError, match="no model of transformers"):
        Engine(torch.nn.Linear(2, 2), 10)
    for change, says in (({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"), ({"is_encoder_decoder": True}, "encoder")):
        model = tiny_llama(torch.float32)
        for name, value in change.items():
            setattr(model.config, name, value)
        with pytest.raises(PromptError, match=says):
            Engine(model, 10)


def test_attention_beside_the_registry_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(torch.float32)
    own = type("Own", (torch.nn.Module,), {"forward": lambda self, hidden_states, **kw: (hidden_states, None)})
    model.model.layers[1].self_attn = own()
    engine = Engine(model, 10)
    with pytest.raises(PromptError, match="1 of 2 layers"):
        engine.run([Piece(engine.open(3), torch.tensor([1, 2, 3]))])
    assert model.config._attn_implementation == "sdpa"


def test_frequencies_that_depend_on_the_batch_bound_the_length() -> None:
    about = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 256}
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
    model = LlamaForCausalLM(LlamaConfig(**about, rope_parameters=rope)).eval()
    assert Engine(model, 100).limit == 32
    engine = Engine(model, 100)
    with pytest.raises(PromptError, match="E-PRM-CAPACITY"):
        engine.run([Piece(engine.open(40), torch.zeros(33, dtype=torch.int64))])
    assert engines.limit(SimpleNamespace()) >= 1 << 30
