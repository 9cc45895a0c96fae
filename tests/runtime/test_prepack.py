"""Bins of prompts: order, capacity, the bounds of first-fit decreasing, the exact search against brute force, and bad prompts."""

from __future__ import annotations

import random

import pytest
import torch

from effllm import prepack
from effllm.errors import PromptError
from effllm.runtime.prepack import lower_bound, plan


def lengths_of(seed: int, count: int, most: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randint(1, most) for _ in range(count)]


def fewest(lengths: list[int], capacity: int) -> int:
    """By trying every partition."""

    def place(i: int, room: list[int], best: int) -> int:
        if len(room) >= best:
            return best
        if i == len(lengths):
            return len(room)
        for b, free in enumerate(room):
            if free >= lengths[i]:
                best = place(i + 1, [*room[:b], free - lengths[i], *room[b + 1 :]], best)
        return place(i + 1, [*room, capacity - lengths[i]], best)

    return place(0, [], len(lengths) + 1)


@pytest.mark.parametrize("seed", range(25))
def test_bins_hold_every_prompt_once_within_the_bounds(seed: int) -> None:
    lengths, capacity = lengths_of(seed, 9, 60), 100
    optimum = fewest(lengths, capacity)
    for exact in (False, True):
        bins, proven = plan(lengths, capacity, exact)
        assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in b) <= capacity for b in bins)
        assert lower_bound(lengths, capacity) <= optimum <= len(bins) <= (11 * optimum + 6) / 9
        assert not proven or len(bins) == optimum
        assert not exact or (proven and len(bins) == optimum)


MISLEADING = [14, 12, 5, 4, 3, 2]  # first-fit decreasing puts 5 beside 14 and needs three bins of 20; 14 + 4 + 2 and 12 + 5 + 3 fill two


def test_exact_beats_first_fit_where_that_is_not_optimal() -> None:
    greedy, exact = plan(MISLEADING, 20), plan(MISLEADING, 20, exact=True)
    assert len(greedy[0]) == 3 and not greedy[1]
    assert sorted(map(sorted, exact[0])) == [[0, 3, 5], [1, 2, 4]] and exact[1]


def test_a_long_search_stops_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effllm.runtime.prepack.NODES", 3)
    bins, proven = plan(MISLEADING, 20, exact=True)
    assert len(bins) == 3 and not proven


def test_layout_restarts_positions_and_restores_the_order() -> None:
    prompts = [[5], [1, 2, 3], [7, 8], [9, 9, 9, 9]]
    packing = prepack(prompts, capacity=6)
    assert packing.capacity == 6 and packing.tokens == 10 and packing.padded_tokens == 16
    for i, prompt in enumerate(prompts):
        place = packing.places[i]
        assert place.prompt == i and place.length == len(prompt)
        run = slice(place.start, place.start + place.length)
        assert packing.ids(place.bin)[0, run].tolist() == prompt
        assert packing.positions(place.bin)[0, run].tolist() == list(range(len(prompt)))
        order = packing.bins[place.bin].index(i)
        assert packing.segments(place.bin)[order] == (place.start, place.length, place.start, place.length)
        assert packing.last(place.bin)[order] == place.start + place.length - 1


def test_the_default_capacity_is_the_longest_prompt_and_one_prompt_is_its_own_bin() -> None:
    assert prepack([[1, 2], [3]]).capacity == 2
    one = prepack([torch.tensor([[4, 5, 6]])])  # (1, n), as tokenizers give it
    assert one.bins == ((0,),) and one.proven and one.ids(0).tolist() == [[4, 5, 6]] and one.positions(0).tolist() == [[0, 1, 2]]
    assert prepack([]).bins == () and prepack([]).padded_tokens == 0


@pytest.mark.parametrize(
    ("prompts", "capacity", "code", "says"),
    [
        ([[1], []], None, "E-PRM-EMPTY", "prompt 1"), ([torch.tensor([1.0])], None, "E-PRM-IDS", "prompt 0"),
        ([[1], torch.ones(2, 3).long()], None, "E-PRM-IDS", "prompt 1"),
        ([[1, 2, 3]], 2, "E-PRM-CAPACITY", "prompt 0 has 3"), ([["a"]], None, "E-PRM-IDS", "prompt 0"), ([torch.tensor([True])], None, "E-PRM-IDS", "bool"),
    ],
)  # fmt: skip
def test_bad_prompts_are_named(prompts: list, capacity: int | None, code: str, says: str) -> None:
    with pytest.raises(PromptError) as error:
        prepack(prompts, capacity)
    assert error.value.code == code and says in error.value.cause
