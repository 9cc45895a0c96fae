"""Edits as plans, and slots that are never reordered."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effllm.errors import EditError
from effllm.runtime.edit.plan import Edit, difference, plan, read_edits
from effllm.runtime.edit.slots import Slots


def test_insert_delete_replace_at_both_ends() -> None:
    ids = [10, 11, 12, 13]
    done = plan(ids, read_edits([(4, 4, [1]), (0, 0, [2, 3]), (1, 3, [])], 4, 100))
    assert done.ids == (2, 3, 10, 13, 1) and done.source == (-1, -1, 0, 3, -1) and done.new == [0, 1, 4]


@pytest.mark.parametrize(
    ("edits", "code"),
    [
        ([(0, 5, [])], "E-EDT-RANGE"), ([(-1, 0, [])], "E-EDT-RANGE"), ([(3, 2, [])], "E-EDT-RANGE"), ([(0, 2, []), (1, 3, [])], "E-EDT-OVERLAP"),
        ([(1, 1, [1]), (1, 1, [2])], "E-EDT-OVERLAP"), ([(0, 1, [100])], "E-EDT-TOKEN"), ([(0, 1, [-1])], "E-EDT-TOKEN"), ([(0, 1)], "E-EDT-FORM"),
        ([(0, 1, "ab")], "E-EDT-FORM"), ([(0, 1.0, [])], "E-EDT-FORM"), ([(True, 1, [])], "E-EDT-FORM"), ([7], "E-EDT-FORM"), ([(0, 1, [1.5])], "E-EDT-FORM"),
    ],
)  # fmt: skip
def test_bad_edits_are_named(edits: object, code: str) -> None:
    with pytest.raises(EditError) as caught:
        read_edits(edits, 4, 100)  # type: ignore[arg-type]
    assert caught.value.code == code


def test_nothing_left() -> None:
    with pytest.raises(EditError, match="E-EDT-EMPTY"):
        plan([1, 2], [Edit(0, 2, ())])


def test_adjacent_edits_do_not_overlap() -> None:
    found = read_edits([(2, 3, [9]), (1, 2, [8]), (3, 3, [7])], 4, 10)
    assert plan([0, 1, 2, 3], found).ids == (0, 8, 9, 7, 3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), max_size=12))
def test_difference_gives_the_new_text(old: list[int], new: list[int]) -> None:
    e = difference(old, new)
    assert [*old[: e.start], *e.ids, *old[e.stop :]] == new
    if e.ids and e.stop > e.start:
        assert old[e.start] != e.ids[0] and old[e.stop - 1] != e.ids[-1]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_many_edits_keep_every_key_at_its_shift(data: st.DataObject) -> None:
    """A key written for position s and now at p has shift p - s; nothing is moved; no two tokens share a slot."""
    slots, ids = Slots.fresh(9, 16), list(range(9))
    written = {slot: p for p, slot in enumerate(slots.order)}
    for step in range(6):
        start = data.draw(st.integers(0, len(ids)))
        stop = data.draw(st.integers(start, min(len(ids), start + 3)))
        new = [100 + step] * data.draw(st.integers(0, 3))
        if len(ids) - (stop - start) + len(new) < 1:
            continue
        change = plan(ids, [Edit(start, stop, tuple(new))])
        need = len(change.new) + 1
        slots = slots.grown(slots.size + need) if slots.room() < need else slots
        again = {len(change.ids) - 1} - set(change.new)
        before = (list(slots.order), list(slots.stored))
        after, encode = slots.after(change, sorted(again))
        assert (slots.order, slots.stored) == before  # a failed edit leaves no trace
        assert not {after.order[p] for p in encode} & set(slots.order)
        for p in encode:
            written[after.order[p]] = p
        slots, ids = after, list(change.ids)
        assert len(set(slots.order)) == len(ids) and all(slots.stored[s] == written[s] for s in slots.order)
        shifts = slots.shifts()
        rows = slots.rows(shifts)
        assert shifts[0] == 0 and all(shifts[rows[s]] == p - written[s] for p, s in enumerate(slots.order))
        at = slots.positions()
        assert [int(at[s]) for s in slots.order] == list(range(len(ids))) and int((at >= 0).sum()) == len(ids)
        assert 1 <= slots.segments() <= len(ids)


def test_typing_at_one_place_makes_two_segments() -> None:
    slots, ids = Slots.fresh(20, 64), list(range(20))
    for i in range(15):
        change = plan(ids, [Edit(5 + i, 5 + i, (50,))])
        slots, _ = slots.after(change)
        ids = list(change.ids)
    assert slots.segments() == 2 and slots.shifts() == [0, 15]
