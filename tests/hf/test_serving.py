"""The serving loop: each request's tokens are those of its run alone, whatever the budget, the memory and the company."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from effllm import generate
from effllm.errors import OptionError, PromptError
from effllm.hf.sampling import Sampling
from effllm.hf.serving import Loop
from tests.hf.tiny import tiny_llama

LENGTHS, NEW = (5, 40, 1, 17, 60, 9, 30), (10, 5, 20, 8, 12, 30, 1)


def requests() -> list[list[int]]:
    draw = random.Random(1)
    return [[draw.randint(3, 60) for _ in range(n)] for n in LENGTHS]


def drain(loop: Loop, got: dict[int, list[int]], limit: int = 2000) -> tuple[int, set[str]]:
    """Steps until nothing is left, and how sequences ended."""
    steps, ends = 0, set()
    while loop.busy:
        for event in loop.step():
            got[event.index].append(event.token)
            ends |= {event.done}
        steps += 1
        assert steps < limit
    return steps, ends


SETTINGS: list[dict[str, Any]] = [
    {"budget": 8, "most": 4, "slots": 400}, {"budget": 1000, "most": 7, "slots": 300}, {"budget": 100, "most": 3, "slots": 90},
    {"budget": 7, "most": 7, "slots": 100, "ahead": 2}, {"budget": 16, "most": 4, "slots": 400, "pad_to": lambda n: -(-n // 16) * 16},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s['budget']}-{s['slots']}")
def test_tokens_are_those_of_single_runs(settings: dict[str, Any]) -> None:
    model, prompts = tiny_llama(torch.float32), requests()
    want = [generate(model, [p], max_new_tokens=n)[0][len(p) :].tolist() for p, n in zip(prompts, NEW, strict=True)]
    loop = Loop(model, **settings)
    got: dict[int, list[int]] = {loop.submit(p, n): [] for p, n in zip(prompts, NEW, strict=True)}
    drain(loop, got)
    assert list(got.values()) == want and loop.engine.free == settings["slots"] and not loop.memory.rows


def test_preempted_requests_lose_nothing() -> None:
    model, prompts = tiny_llama(torch.float32), requests()
    want = [generate(model, [p], max_new_tokens=20, eos_token_id=[])[0][len(p) :].tolist() for p in prompts]
    loop = Loop(model, budget=16, most=7, slots=90, ahead=1, eos_token_id=[])
    preempted = 0
    plain = loop.scheduler.step

    def counting():
        nonlocal preempted
        step = plain()
        preempted += len(step.preempted)
        return step

    loop.scheduler.step = counting  # type: ignore[method-assign]
    got: dict[int, list[int]] = {loop.submit(p, 20): [] for p in prompts}
    drain(loop, got)
    assert preempted > 0 and list(got.values()) == want


def test_sampling_by_seed_does_not_depend_on_the_company() -> None:
    model, prompts = tiny_llama(torch.float32), requests()
    sampling = Sampling(temperature=1.0, top_k=10)
    want = [generate(model, [p], max_new_tokens=8, temperature=1.0, top_k=10, seed=[i])[0][len(p) :].tolist() for i, p in enumerate(prompts)]
    loop = Loop(model, budget=16, most=3, slots=200, sampling=sampling)
    got: dict[int, list[int]] = {loop.submit(p, 8, seed=i): [] for i, p in enumerate(prompts)}
    drain(loop, got)
    assert list(got.values()) == want


def test_running_sequences_get_a_token_in_every_step_while_a_long_prompt_is_read() -> None:
    model = tiny_llama(torch.float32)
    loop = Loop(model, budget=32, most=4, slots=1000, eos_token_id=[])
    running = [loop.submit([i + 3, 4], 60) for i in range(3)]
    loop.step()
    long = loop.submit(list(range(3, 60)) * 8, 1)
    steps = 0
    while long in loop.memory.rows or loop.scheduler.waiting:
        events = loop.step()
        assert {e.index for e in events} >= set(running) and loop.last.decodes == 3 and 3 + loop.last.prompt_tokens <= 32
        steps += 1
    assert steps == -(-456 // 29)


def test_cancelled_requests_free_their_room_wherever_they_are() -> None:
    model = tiny_llama(torch.float32)
    loop = Loop(model, budget=8, most=2, slots=60, eos_token_id=[])
    decoding, reading, waiting = loop.submit([5, 6], 10), loop.submit(list(range(3, 33)), 5), loop.submit([7], 3)
    loop.step()
    loop.step()
    made = loop.cancel(decoding)
    assert len(made) == 2 and loop.cancel(reading) == [] and loop.cancel(waiting) == []
    assert not loop.busy and loop.engine.free == 60 and loop.step() == []
    with pytest.raises(KeyError):
        loop.cancel(decoding)


def test_a_failed_forward_can_be_tried_again() -> None:
    model, prompts = tiny_llama(torch.float32), requests()[:4]
    want = [generate(model, [p], max_new_tokens=6, eos_token_id=[])[0][len(p) :].tolist() for p in prompts]
    loop = Loop(model, budget=8, most=4, slots=200, eos_token_id=[])
    got: dict[int, list[int]] = {loop.submit(p, 6): [] for p in prompts}
    for turn in range(60):
        if turn % 2:  # every other forward breaks in the second layer
            hook = model.model.layers[1].register_forward_pre_hook(lambda *a: (_ for _ in ()).throw(ValueError("no")))
            with pytest.raises(ValueError, match="no"):
                loop.step()
            hook.remove()
        else:
            for event in loop.step():
                got[event.index].append(event.token)
        if not loop.busy:
            break
    assert list(got.values()) == want


def test_requests_that_cannot_be_are_refused_and_leave_nothing() -> None:
    loop = Loop(tiny_llama(torch.float32), budget=8, most=4, slots=1200)
    for prompt, new, code in (([], 1, "E-PRM-EMPTY"), ([3], 0, "E-OPT-REQUEST"), ([3] * 1020, 6, "E-PRM-CAPACITY"), ([99], 1, "E-PRM-IDS")):
        with pytest.raises((OptionError, PromptError)) as error:
            loop.submit(prompt, new)
        assert error.value.code == code
    small = Loop(tiny_llama(torch.float32), budget=8, most=4, slots=10)
    with pytest.raises(OptionError, match="E-OPT-MEMORY"):
        small.submit([3] * 6, 6)
    assert small.submit([3] * 6, 5) == 0 and not loop.busy
    with pytest.raises(OptionError, match="E-OPT-BUDGET"):
        Loop(tiny_llama(torch.float32), budget=2, most=4, slots=10)
