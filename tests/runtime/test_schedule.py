"""The scheduler's promises, checked at every step of random loads; then each rule alone. No model."""

from __future__ import annotations

import random

import pytest

from effllm.errors import OptionError
from effllm.runtime.schedule import Counted, Request, Scheduler, Step, declining


def simulate(scheduler: Scheduler, requests: list[Request], arrivals: list[int], limit: int = 20_000) -> tuple[dict[int, int], list[Step]]:
    """Run to the end; new tokens per request and all steps, with the invariants asserted on the way."""
    wanted, made, computed, steps = {r.id: r.new for r in requests}, {r.id: 0 for r in requests}, {r.id: 0 for r in requests}, []
    prompt = {r.id: r.prompt for r in requests}
    turn = 0
    while scheduler.busy or turn <= max(arrivals):
        for r, at in zip(requests, arrivals, strict=True):
            if at == turn:
                scheduler.add(r)
        decoding = [r.id for r in scheduler.running if r.decoding]
        step = scheduler.step()
        for id in step.preempted:
            prompt[id], computed[id] = first[id] + made[id], 0  # what was made is computed again too
        assert step.tokens <= max(scheduler.budget, len(step.decodes))
        assert step.decodes == [i for i in decoding if i not in step.preempted]  # stall-free: all of them, once
        assert len(scheduler.running) <= scheduler.most
        if isinstance(scheduler.memory, Counted):
            assert sum(scheduler.memory.held.values()) <= scheduler.memory.slots
        for chunk in step.chunks:
            assert chunk.length >= 1 and chunk.start == computed[chunk.id]
            computed[chunk.id] += chunk.length
            assert chunk.last == (computed[chunk.id] == prompt[chunk.id])
        for id in [*step.decodes, *(c.id for c in step.chunks if c.last)]:
            made[id] += 1
            if made[id] == wanted[id]:
                scheduler.finish(id)
        steps.append(step)
        turn += 1
        assert turn < limit, "no progress"
    assert all(computed[r] == prompt[r] for r in prompt)
    return made, steps


first: dict[int, int] = {}


def load(seed: int, count: int, longest: int) -> tuple[list[Request], list[int]]:
    draw = random.Random(seed)
    requests = [Request(i, draw.randint(1, longest), draw.randint(1, 12)) for i in range(count)]
    first.clear()
    first.update({r.id: r.prompt for r in requests})
    return requests, sorted(draw.randint(0, 40) for _ in range(count))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("slots", [4000, 90])
def test_every_request_gets_its_tokens(seed: int, slots: int) -> None:
    requests, arrivals = load(seed, 25, 60)
    wanted = {r.id: r.new for r in requests}
    made, steps = simulate(Scheduler(16, 6, Counted(slots)), requests, arrivals)
    assert made == wanted
    if slots == 4000:
        assert not any(s.preempted for s in steps) and sum(c.length for s in steps for c in s.chunks) == sum(first.values())
        admitted = [i for s in steps for i in s.admitted]
        assert admitted == sorted(admitted)  # first come, first served


def test_small_memory_does_preempt() -> None:
    requests, arrivals = load(0, 25, 60)
    _, steps = simulate(Scheduler(16, 6, Counted(90)), requests, arrivals)
    assert sum(len(s.preempted) for s in steps) > 0


def test_a_long_prompt_delays_nobody() -> None:
    scheduler = Scheduler(32, 4, Counted(10_000))
    for i in range(3):
        scheduler.add(Request(i, 4, 500))
    assert scheduler.step().tokens == 12
    scheduler.add(Request(3, 2000, 1))
    sizes = []
    while any(r.id == 3 for r in (*scheduler.waiting, *scheduler.running)):
        step = scheduler.step()
        assert step.decodes == [0, 1, 2]
        sizes.append(step.tokens)
        if step.chunks[0].last:
            scheduler.finish(3)
    assert len(sizes) == -(-2000 // 29) and max(sizes) == 32


def test_begun_prompts_come_before_new_ones_and_a_large_one_blocks_small_ones() -> None:
    scheduler = Scheduler(10, 3, Counted(30))
    scheduler.add(Request(0, 15, 2))
    scheduler.add(Request(1, 20, 2))  # does not fit beside the first
    scheduler.add(Request(2, 1, 1))  # would, and waits its turn
    assert [(c.id, c.length) for c in scheduler.step().chunks] == [(0, 10)]
    assert [(c.id, c.length, c.last) for c in scheduler.step().chunks] == [(0, 5, True)]
    scheduler.finish(0)
    assert [(c.id, c.length) for c in scheduler.step().chunks] == [(1, 10)]
    scheduler.finish(1)  # cancelled half way: its memory is free
    assert [(c.id, c.last) for c in scheduler.step().chunks] == [(2, True)] and scheduler.memory.held == {2: 1}


def test_undo_is_the_step_not_taken() -> None:
    scheduler = Scheduler(8, 4, Counted(100))
    for i in range(3):
        scheduler.add(Request(i, 6, 3))
    state = lambda: [(r.id, r.done, r.made) for r in scheduler.running]  # noqa: E731
    scheduler.step()
    before = state()
    step = scheduler.step()
    assert state() != before
    scheduler.undo(step)
    assert [s for s in state() if s[1:] != (0, 0)] == before[:2]
    again = scheduler.step()
    assert (again.decodes, again.chunks) == (step.decodes, step.chunks)


def test_cancelling() -> None:
    scheduler = Scheduler(4, 1, Counted(10))
    scheduler.add(Request(7, 2, 2))
    scheduler.add(Request(8, 2, 2))
    scheduler.step()
    scheduler.finish(8)
    scheduler.finish(7)
    assert not scheduler.busy and scheduler.step() == Step() and scheduler.memory.held == {}
    with pytest.raises(KeyError):
        scheduler.finish(7)


def test_declining_chunks() -> None:
    chunk = declining(512, 128, 4)
    sizes = [chunk(done, 2000) for done in range(0, 2000, 100)]
    assert sizes[0] == 512 and sizes[-1] == 128 and sizes == sorted(sizes, reverse=True) and all(s % 32 == 0 for s in sizes)
    scheduler = Scheduler(1000, 1, Counted(3000), chunk)
    scheduler.add(Request(0, 2000, 1))
    taken = []
    while not taken or sum(taken) < 2000:
        taken.append(scheduler.step().tokens)
    assert taken[0] == 512 and sum(taken) == 2000 and taken == sorted(taken, reverse=True)


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: Scheduler(3, 4, Counted(9)), "E-OPT-BUDGET"), (lambda: Scheduler(3, 0, Counted(9)), "E-OPT-BUDGET"),
        (lambda: declining(1, 2, 3), "E-OPT-BUDGET"),
        (lambda: Scheduler(4, 4, Counted(9)).add(Request(0, 0, 1)), "E-OPT-REQUEST"),
        (lambda: Scheduler(4, 4, Counted(9)).add(Request(0, 1, 0)), "E-OPT-REQUEST"),
        (lambda: Scheduler(4, 4, Counted(9)).add(Request(0, 9, 2)), "E-OPT-MEMORY"),
    ],
)  # fmt: skip
def test_bad_values(make, code: str) -> None:
    with pytest.raises(OptionError) as error:
        make()
    assert error.value.code == code


def test_two_requests_of_one_id() -> None:
    scheduler = Scheduler(4, 4, Counted(9))
    scheduler.add(Request(0, 1, 1))
    with pytest.raises(OptionError, match="E-OPT-REQUEST"):
        scheduler.add(Request(0, 1, 1))
