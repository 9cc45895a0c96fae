"""The session check: the hand-built model is right on every task, lossless and coarse caches pass, evicting ones fail on later turns."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from effllm.hf.cache import CompressedCache
from effllm.hf.induction import FIRST, MAX, induction_model, number_features
from effllm.hf.kv_evict import EvictingCache
from effllm.hf.lifecycle import Row, Session, run
from effllm.hf.lifecycle_tasks import TASKS, text_sessions, token_sessions
from effllm.runtime.caches.ems import Ems
from tests.hf.tiny import tiny_llama, tiny_tokenizer

LENGTH = 300


@pytest.fixture(scope="module")
def model() -> Any:
    return induction_model()


def rows(model: Any, make: Any, tasks: tuple[str, ...] = TASKS, count: int = 1) -> dict[str, Row]:
    sessions = [s for t in tasks for s in token_sessions(t, LENGTH, count, 3)]
    return {r.task: r for r in run(model, sessions, make, lambda: CompressedCache(model, "dense"))}


@torch.no_grad()
@pytest.mark.parametrize("task", TASKS)
def test_the_model_answers_everything_by_itself(model: Any, task: str) -> None:
    for s in token_sessions(task, 400, 3):
        ids, cache = torch.cat((s.context, s.turns[0][0]))[None], DynamicCache()
        made = model.generate(ids, past_key_values=cache, max_new_tokens=len(s.turns[0][1]), do_sample=False, attention_mask=torch.ones_like(ids))
        assert made[0, ids.shape[1] :].tolist() == s.turns[0][1].tolist()


@torch.no_grad()
def test_answers_come_from_the_context(model: Any) -> None:
    s = token_sessions("kv", LENGTH, 1)[0]
    question, answer = s.turns[0]
    at = (s.context == answer[0]).nonzero()[0]
    changed = s.context.clone()
    changed[at] = question[1] + 1 if question[1] + 1 != answer[0] else question[1] + 2
    logits = model(torch.cat((changed, question))[None]).logits[0, -1]
    assert int(logits.argmax()) == int(changed[at])
    numbers = torch.tensor([[0, FIRST + 3, FIRST + 40, FIRST + 39, 90, MAX]])
    assert int(model(numbers).logits[0, -1].argmax()) == FIRST + 40
    rising = number_features(64).sum(1)
    assert (rising.diff() > 0.1).all()


def test_neutral_and_coarse_caches_pass_everything(model: Any) -> None:
    for spec in ("dense(page=16,window=8)", "kivi(bits=4,page=32,group=32,window=8)"):
        for r in rows(model, lambda spec=spec: CompressedCache(model, spec)).values():
            assert (r.first, r.requests, r.isolated, r.reloaded) == (1, 1, True, True), r
            assert r.task == "max" or r.later == 1
            assert r.kl < (1e-9 if spec.startswith("dense") else 1e-3)


def test_bytes_are_those_of_the_cache(model: Any) -> None:
    specs = ("dense(page=16)", "kivi(bits=2,page=32,group=32,window=0)")
    dense, packed = (rows(model, lambda s=s: CompressedCache(model, s), ("kv",))["kv"].bytes_per_token for s in specs)
    # two layers, two key heads of 128 channels, fp32; two codes in a byte and two fp16 numbers in 32, dense tokens on top
    assert dense == pytest.approx(2 * 2 * 2 * 128 * 4, rel=0.35) and packed < dense / 4


def test_eviction_fails_on_later_turns(model: Any) -> None:
    found = rows(model, lambda: EvictingCache(model, Ems(budget=64, slack=16, window=16)), ("kv", "prefix-suffix", "variables"))
    for r in found.values():
        assert r.isolated and r.reloaded and r.later < 0.7 and r.kl > 0.1
    whole = rows(model, lambda: EvictingCache(model, Ems(budget=400, slack=64)), ("kv",))["kv"]
    assert (whole.first, whole.later, whole.requests) == (1, 1, 1)  # nothing was evicted


def test_a_cache_that_leaks_between_requests_is_caught() -> None:
    class Leaky(CompressedCache):
        def restore(self, state: Any) -> None:
            """Forgets to take the tokens of the last request back."""

    class Lossy(CompressedCache):
        def load(self, path: Any) -> CompressedCache:
            """Loses a little on the way."""
            super().load(path)
            self.compressed[1].ring[:, :, :, :8] *= 1.01
            return self

    model = tiny_llama(torch.float32)  # attention of the hand-built one is so sharp that a leak may leave its logits as they are
    g = torch.Generator().manual_seed(0)
    turns = tuple((torch.randint(64, (3,), generator=g), torch.randint(64, (2,), generator=g)) for _ in range(3))
    sessions = [Session("noise", torch.randint(64, (90,), generator=g), turns)]
    for kind, isolated, reloaded in ((CompressedCache, True, True), (Leaky, False, False), (Lossy, True, False)):
        row = run(model, sessions, lambda kind=kind: kind(model, "kivi(bits=4,page=32,group=32,window=8)"), lambda: CompressedCache(model, "dense"))[0]
        assert (row.isolated, row.reloaded) == (isolated, reloaded)
        assert row.kl < 0.1


@pytest.mark.parametrize("task", TASKS)
def test_sessions_are_reproducible_and_fit(task: str) -> None:
    a, b = (token_sessions(task, 500, 2, seed=3) for _ in range(2))
    assert all(torch.equal(x.context, y.context) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0].context[:100], a[1].context[:100])
    for s in a:
        assert 400 <= len(s.context) <= 620 and len(s.turns) == (1 if task == "max" else 4)
        joined = ",".join(map(str, s.context.tolist()))
        for question, answer in s.turns:
            if task != "max":  # what is asked for is there, behind the question
                assert ",".join(map(str, [*question.tolist(), *answer.tolist()])) in joined
            else:
                assert int(answer) == int(s.context[s.context < FIRST + 64].max())


def test_text_sessions_ask_for_what_the_text_says() -> None:
    tokenizer = tiny_tokenizer()
    for task in TASKS:
        s = text_sessions(tokenizer, task, 300, 1, 3)[0]
        assert dataclasses.asdict(s)["task"] == task and len(s.context) > 20 and all(len(q) and len(a) for q, a in s.turns)
