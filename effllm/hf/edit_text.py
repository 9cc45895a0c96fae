"""Edits of a text as edits of its tokens: a window around each place is tokenized again, and the ids are compared."""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from effllm.errors import EditError
from effllm.runtime.edit.plan import difference

WINDOW = 16  # tokens on either side of an edit
BORDER = 4  # tokens at the window's ends that have to come out as they were; else the window is widened


@dataclass(frozen=True)
class TextMap:
    """A text and its tokens: `lead` ids without text (such as a begin token), then one id per entry of `starts`, its first character."""

    tokenizer: Any
    text: str
    lead: tuple[int, ...]
    body: tuple[int, ...]
    starts: tuple[int, ...]

    @property
    def ids(self) -> list[int]:
        """All token ids."""
        return [*self.lead, *self.body]

    @classmethod
    def of(cls, tokenizer: Any, text: str) -> TextMap:
        """Tokenize a text. EditError (E-EDT-TEXT) without a fast tokenizer."""
        if tokenizer is None or not getattr(tokenizer, "is_fast", False):
            raise EditError("E-EDT-TEXT", "editing text needs a fast tokenizer", "pass tokenizer=, or edit token ids")
        body, starts = _encode(tokenizer, text)
        return cls(tokenizer, text, tuple(tokenizer("")["input_ids"]), tuple(body), tuple(starts))

    @classmethod
    def of_ids(cls, tokenizer: Any, ids: list[int]) -> TextMap:
        """The text of ids. EditError (E-EDT-TEXT) where tokenizing it does not give them back."""
        if tokenizer is None:
            raise EditError("E-EDT-TEXT", "the session has no tokenizer", "pass tokenizer=, or edit token ids")
        lead = tokenizer("")["input_ids"]
        text = tokenizer.decode(ids[len(lead) :], clean_up_tokenization_spaces=False)
        found = cls.of(tokenizer, text)
        if found.ids != ids:
            raise EditError("E-EDT-TEXT", "tokenizing the text of these ids does not give them back", "start the session from text, or edit token ids")
        return found

    def edited(self, edits: Iterable[tuple[int, int, str]]) -> tuple[TextMap, list[tuple[int, int, tuple[int, ...]]]]:
        """The text after edits (start, stop, new text) in characters, and the same edits in tokens. Raises EditError."""
        places = _checked(edits, len(self.text))
        width = WINDOW
        while True:
            done = self._windows(places, width)
            if done is not None:
                return done
            width *= 4

    def _windows(self, places: list[tuple[int, int, str]], width: int) -> tuple[TextMap, list[tuple[int, int, tuple[int, ...]]]] | None:
        """As `edited` with windows of a width; None where a border comes out differently."""
        count = len(self.body)
        groups: list[tuple[int, int, list[tuple[int, int, str]]]] = []
        for a, b, new in places:
            low, high = max(0, bisect_right(self.starts, a) - 1 - width), min(count, bisect_left(self.starts, b) + width)
            low = bisect_left(self.starts, self.starts[low]) if low < count else low  # a character of several tokens stays whole
            high = bisect_right(self.starts, self.starts[high]) - 1 if high < count else count
            while 0 < high < count and self.starts[high] == self.starts[high - 1]:
                high -= 1
            if groups and low <= groups[-1][1]:
                first, last, held = groups.pop()
                groups.append((first, max(last, high), [*held, (a, b, new)]))
            else:
                groups.append((low, high, [(a, b, new)]))
        body, starts, text, changes = list[int](), list[int](), "", list[tuple[int, int, tuple[int, ...]]]()
        at = 0
        for low, high, held in groups:
            text, starts = self._copy(at, low, text, body, starts)
            piece, end = "", self._char(low)
            for a, b, new in held:
                piece, end = piece + self.text[end:a] + new, b
            piece += self.text[end : self._char(high)]
            ids, offsets = _encode(self.tokenizer, piece)
            old = list(self.body[low:high])
            if (low > 0 and ids[:BORDER] != old[:BORDER]) or (high < count and ids[-BORDER:] != old[-BORDER:]):
                return None
            change = difference(old, ids)
            if change.ids or change.start < change.stop:
                shift = len(self.lead) + low
                changes.append((shift + change.start, shift + change.stop, change.ids))
            body += ids
            starts += [len(text) + o for o in offsets]
            text += piece
            at = high
        text, starts = self._copy(at, count, text, body, starts)
        return TextMap(self.tokenizer, text, self.lead, tuple(body), tuple(starts)), changes

    def _copy(self, low: int, high: int, text: str, body: list[int], starts: list[int]) -> tuple[str, list[int]]:
        first = self._char(low)
        body += self.body[low:high]
        moved = starts + [len(text) + s - first for s in self.starts[low:high]]
        return text + self.text[first : self._char(high)], moved

    def _char(self, token: int) -> int:
        return self.starts[token] if token < len(self.starts) else len(self.text)


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(found["input_ids"]), [a for a, _ in found["offset_mapping"]]


def _checked(edits: Iterable[tuple[int, int, str]], length: int) -> list[tuple[int, int, str]]:
    places = []
    for edit in edits:
        if not (len(edit) == 3 and isinstance(edit[0], int) and isinstance(edit[1], int) and isinstance(edit[2], str)):
            step = "give a list of (start, stop, text) in characters of the present text"
            raise EditError("E-EDT-FORM", f"{str(edit)[:60]} is not (start, stop, text)", step)
        if not 0 <= edit[0] <= edit[1] <= length:
            raise EditError("E-EDT-RANGE", f"characters {edit[0]} to {edit[1]} of a text of {length}", "edits lie in 0 <= start <= stop <= length")
        places.append(edit)
    places.sort(key=lambda e: e[:2])
    for a, b in itertools.pairwise(places):
        if b[0] < a[1] or b[:2] == a[:2]:
            raise EditError("E-EDT-OVERLAP", f"edits [{a[0]}, {a[1]}) and [{b[0]}, {b[1]}) overlap", "join them into one, or apply them one after the other")
    return places
