"""Edits of a token list: checked, ordered, and as spans of the new text."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from effllm.errors import EditError


@dataclass(frozen=True)
class Edit:
    """Tokens [start, stop) of the old text become `ids`: an insertion where start = stop, a deletion where `ids` is empty."""

    start: int
    stop: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """The new text: `ids`, where each token was in the old text (`source`, -1 for new tokens), in order of positions."""

    ids: tuple[int, ...]
    source: tuple[int, ...]

    @property
    def new(self) -> list[int]:
        """Positions whose tokens are new."""
        return [p for p, s in enumerate(self.source) if s < 0]


def read_edits(edits: Iterable[Sequence[object]], length: int, vocabulary: int) -> list[Edit]:
    """Edits (start, stop, ids) in order of place, checked against a text of `length` tokens.

    Raises EditError: E-EDT-FORM (not such a triple), E-EDT-RANGE (outside the text), E-EDT-OVERLAP (two edits share a token or insert at
    one place), E-EDT-TOKEN (an id outside the vocabulary).
    """
    step = "give a list of (start, stop, ids) in tokens of the present text"
    found = []
    for edit in edits:
        try:
            start, stop, ids = edit
            read = Edit(_whole(start), _whole(stop), tuple(_whole(i) for i in _listed(ids)))
        except (TypeError, ValueError) as error:
            raise EditError("E-EDT-FORM", f"{str(edit)[:60]} is not (start, stop, ids): {error}", step) from error
        if not 0 <= read.start <= read.stop <= length:
            raise EditError("E-EDT-RANGE", f"tokens {read.start} to {read.stop} of a text of {length}", "edits lie in 0 <= start <= stop <= length")
        for i in read.ids:
            if not 0 <= i < vocabulary:
                raise EditError("E-EDT-TOKEN", f"token id {i} is outside of the vocabulary of {vocabulary}", "encode the text with the model's own tokenizer")
        found.append(read)
    found.sort(key=lambda e: (e.start, e.stop))
    for a, b in itertools.pairwise(found):
        if b.start < a.stop or (b.start, b.stop) == (a.start, a.stop):
            cause = f"edits [{a.start}, {a.stop}) and [{b.start}, {b.stop}) overlap"
            raise EditError("E-EDT-OVERLAP", cause, "join them into one, or apply them one after the other")
    return found


def plan(ids: Sequence[int], edits: Sequence[Edit]) -> Plan:
    """The text after ordered, disjoint edits. EditError (E-EDT-EMPTY) where nothing is left."""
    new: list[int] = []
    source: list[int] = []
    at = 0
    for edit in edits:
        new += [*ids[at : edit.start], *edit.ids]
        source += [*range(at, edit.start), *([-1] * len(edit.ids))]
        at = edit.stop
    new += ids[at:]
    source += range(at, len(ids))
    if not new:
        raise EditError("E-EDT-EMPTY", "the edit leaves no token", "keep one token, or start a new session")
    return Plan(tuple(new), tuple(source))


def difference(old: Sequence[int], new: Sequence[int]) -> Edit:
    """The one edit between two token lists: all but their longest common prefix and suffix."""
    shorter = min(len(old), len(new))
    head = next((i for i in range(shorter) if old[i] != new[i]), shorter)
    tail = next((i for i in range(shorter - head) if old[-1 - i] != new[-1 - i]), shorter - head)
    return Edit(head, len(old) - tail, tuple(new[head : len(new) - tail]))


def _whole(value: object) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{value!r} is no whole number")
    return int(value.__index__())


def _listed(ids: object) -> Sequence[object]:
    listed = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(listed, str) or not isinstance(listed, Sequence):
        raise TypeError("the new tokens must be a list of ids")
    return listed
