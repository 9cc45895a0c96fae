"""Extents never overlap, and fill what is free; the segment table refuses what cannot be."""

from __future__ import annotations

import random

import pytest

from effllm.errors import PromptError
from effllm.runtime.arena import Extents
from effllm.runtime.segments import Segment, table


@pytest.mark.parametrize("seed", range(10))
def test_extents_are_disjoint_and_complete(seed: int) -> None:
    draw, extents, held = random.Random(seed), Extents(50), {}
    for _ in range(300):
        if held and draw.random() < 0.45:
            start = draw.choice(list(held))
            extents.give(start)
            del held[start]
        elif held and draw.random() < 0.3:
            start = draw.choice(list(held))
            length = held[start] + draw.randint(-2, 5)
            room = min([s for s in held if s > start], default=50) - start
            assert extents.extend(start, length) == (length <= room)
            if length <= room:
                held[start] = max(length, held[start])
        else:
            length = draw.randint(1, 12)
            gaps, at = [], 0
            for s in sorted(held):
                gaps.append((at, s - at))
                at = s + held[s]
            gaps.append((at, 50 - at))
            start = extents.take(length)
            assert start == next((s for s, n in gaps if n >= length), None)  # the first that fits
            if start is not None:
                held[start] = length
        assert extents.free == 50 - sum(held.values())


def test_unknown_extents_and_lengths() -> None:
    extents = Extents(4)
    assert extents.take(5) is None and extents.take(4) == 0 and extents.take(1) is None
    with pytest.raises(KeyError):
        extents.give(1)
    with pytest.raises(KeyError):
        extents.extend(3, 1)
    with pytest.raises(ValueError):
        extents.take(0)


def test_table_rows() -> None:
    rows = [Segment(3, 1, 0, 9), Segment(0, 2, 9, 2)]
    assert table(rows, 4, 11).tolist() == [[3, 1, 0, 9], [0, 2, 9, 2]] and table([], 4, 4).shape == (0, 4)


@pytest.mark.parametrize(
    "rows",
    [
        [Segment(0, 0, 0, 1)], [Segment(0, 2, 0, 1)], [Segment(0, 1, -1, 1)], [Segment(0, 1, 3, 2)], [Segment(3, 2, 0, 2)],
        [Segment(0, 2, 0, 2), Segment(1, 1, 2, 1)],
    ],
)  # fmt: skip
def test_impossible_rows(rows: list[Segment]) -> None:
    with pytest.raises(PromptError, match="E-PRM-SEGMENTS"):
        table(rows, 4, 4)
