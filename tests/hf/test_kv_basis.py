"""Calibrated and trained tables on a small model: bases stay orthogonal, training lowers the loss, the cache takes them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from effllm.errors import CacheError
from effllm.hf.cache import CompressedCache
from effllm.hf.kv_basis import BasisTraining, train_basis
from effllm.hf.kv_calibrate import collect, pca_tables, sort_tables, weighted_tables
from effllm.solvers.kv.weighted import lost

HOW = BasisTraining(steps=12, rate=2e-2, warmup=1, kl=1.0, interval=4, high=0.5, prompt=40, window=4)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2)).eval()


def windows(count: int = 3) -> list[torch.Tensor]:
    return list(torch.randint(64, (count, 70), generator=torch.Generator().manual_seed(2)))


def test_training_lowers_the_loss_and_keeps_bases_orthogonal(model: LlamaForCausalLM) -> None:
    start = pca_tables(collect(model, windows()))
    losses: list[float] = []
    before = {n: p.clone() for n, p in model.named_parameters()}
    made = train_basis(model, windows(1) * 4, start, HOW, lambda step, loss: losses.append(loss))
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
    for layer, tables in made.items():
        for u in tables[::2]:
            torch.testing.assert_close(u.mT @ u, torch.eye(16).expand(2, 16, 16), rtol=0, atol=2e-6)
        assert not torch.equal(tables[0], start[layer][0]) and torch.equal(tables[1], start[layer][1])
    assert all(torch.equal(p, before[n]) and p.requires_grad for n, p in model.named_parameters())


def test_no_steps_give_the_start(model: LlamaForCausalLM) -> None:
    start = pca_tables(collect(model, windows()))
    made = train_basis(model, windows(), start, BasisTraining(steps=0, prompt=40))
    for layer, tables in start.items():
        for a, b in zip(tables, made[layer], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def test_remembering_the_dense_model_changes_nothing(model: LlamaForCausalLM) -> None:
    start = pca_tables(collect(model, windows()))
    made = [train_basis(model, windows(), start, replace(HOW, steps=7, remember=keep)) for keep in (True, False)]
    assert all(torch.equal(a, b) for layer in made[0] for a, b in zip(made[0][layer], made[1][layer], strict=True))


@torch.no_grad()
def test_collected_statistics_are_those_of_the_attention(model: LlamaForCausalLM) -> None:
    before = model.config._attn_implementation
    states = collect(model, windows(2))
    assert model.config._attn_implementation == before and len(states) == 2
    attention, seen = model.model.layers[0].self_attn, []
    hook = attention.q_proj.register_forward_hook(lambda m, a, out: seen.append(out))
    for ids in windows(2):
        model(ids[None])
    hook.remove()
    q = torch.cat(seen, 1).double()[0]  # before the rotation, which leaves lengths alone
    assert states[0].queries.count == 2 * 2 * 70
    lengths = q.square().unflatten(-1, (2, 2 * 16)).sum((0, 2))
    torch.testing.assert_close(torch.diagonal(states[0].queries.second, dim1=-2, dim2=-1).sum(-1), lengths, rtol=1e-5, atol=0)
    w = attention.o_proj.weight.double()
    torch.testing.assert_close(states[0].output[1], sum(w[:, 16 * h : 16 * h + 16].mT @ w[:, 16 * h : 16 * h + 16] for h in (2, 3)), rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_weighted_tables_keep_more_of_scores(model: LlamaForCausalLM) -> None:
    states = collect(model, windows())
    plain, made = pca_tables(states), weighted_tables(states)
    for i, s in enumerate(states):
        for side, (c, w) in enumerate(((s.keys.centred, s.queries.second / s.queries.count), (s.values.centred, s.output))):
            a, b = (lost(t[i][2 * side].double(), c, w, [8]).log().mean() for t in (plain, made))
            assert b < a


@torch.no_grad()
@pytest.mark.parametrize("spec", ["matryoshka(k=full,v=full,page=8,window=4)", "bfp(bits=8,vbits=8,block=16,page=8,window=4)"])
def test_caches_take_the_tables(model: LlamaForCausalLM, spec: str) -> None:
    states = collect(model, windows())
    tables = pca_tables(states) if spec.startswith("m") else sort_tables(states, values=True)
    ids = windows()[0][None]
    cache = CompressedCache(model, spec, tables=tables)
    model(ids[:, :60], past_key_values=cache)
    got = model(ids[:, 60:], past_key_values=cache).logits
    true = model(ids).logits[:, 60:]
    assert float((got - true).norm() / true.norm()) < (1e-4 if spec.startswith("m") else 2e-2)


def test_refusals(model: LlamaForCausalLM) -> None:
    with pytest.raises(CacheError, match="E-KVC-CALIBRATION"):
        collect(model, [])
    states = collect(model, windows())
    with pytest.raises(CacheError, match="E-KVC-CALIBRATION"):
        train_basis(model, windows(), pca_tables(states), BasisTraining(prompt=69))
    with pytest.raises(CacheError, match="E-KVC-VALUE"):
        sort_tables(states, "pair")
