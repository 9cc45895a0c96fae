"""Where the tokens of an edited text lie in a cache that is never reordered.

Attention does not care in which order keys lie, so an edit moves nothing: new tokens take free slots, deleted ones leave theirs, and
every slot remembers the position that its key was rotated for. The shift of a slot is its token's position now less that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from effllm.runtime.edit.plan import Plan


@dataclass
class Slots:
    """`order[p]` is the slot of the token at position p; `stored[slot]` the position that its key was rotated for; `size` the slots."""

    size: int
    order: list[int] = field(default_factory=list)
    stored: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stored += [0] * (self.size - len(self.stored))

    @classmethod
    def fresh(cls, length: int, size: int) -> Self:
        """A text as a prefill leaves it: token p in slot p."""
        return cls(size, list(range(length)), list(range(length)))

    @property
    def high(self) -> int:
        """One past the last slot in use."""
        return max(self.order, default=-1) + 1

    def room(self) -> int:
        """Free slots."""
        return self.size - len(self.order)

    def take(self, count: int) -> list[int]:
        """The lowest free slots. They are not marked as used."""
        used = set(self.order)
        free: list[int] = []
        at = 0
        while len(free) < count:
            if at >= self.size:
                raise IndexError("no free slot")  # callers make room first
            if at not in used:
                free.append(at)
            at += 1
        return free

    def grown(self, size: int) -> Self:
        """The same text in a longer cache."""
        return replace(self, size=size, order=list(self.order), stored=list(self.stored))

    def after(self, plan: Plan, again: Sequence[int] = ()) -> tuple[Self, list[int]]:
        """The slots after an edit, and the positions that have to be encoded: new tokens, and those in `again`.

        Encoded tokens get slots that the present text does not use, so that this object stays valid if encoding them fails.
        """
        encode = sorted({*plan.new, *again})
        slots = dict(zip(encode, self.take(len(encode)), strict=True))
        order = [slots[p] if p in slots else self.order[s] for p, s in enumerate(plan.source)]
        stored = list(self.stored)
        for p, slot in slots.items():
            stored[slot] = p
        return replace(self, order=order, stored=stored), encode

    def extended(self, slots: Sequence[int]) -> Self:
        """The text with more tokens at its end, in slots that they were encoded into."""
        stored = list(self.stored)
        for p, slot in enumerate(slots, start=len(self.order)):
            stored[slot] = p
        return replace(self, order=[*self.order, *slots], stored=stored)

    def shifts(self) -> list[int]:
        """Distinct shifts, 0 first, in order of appearance: one table row each."""
        return list(dict.fromkeys([0, *(p - self.stored[s] for p, s in enumerate(self.order))]))

    def rows(self, shifts: Sequence[int]) -> Tensor:
        """Table row of every slot, int32 (size,); 0 for slots not in use."""
        index = {shift: i for i, shift in enumerate(shifts)}
        rows = [0] * self.size
        for p, s in enumerate(self.order):
            rows[s] = index[p - self.stored[s]]
        return torch.tensor(rows, dtype=torch.int32)

    def positions(self) -> Tensor:
        """Position of the token in every slot, int64 (size,); -1 for slots not in use."""
        at = torch.full((self.size,), -1, dtype=torch.long)
        if self.order:
            at[torch.tensor(self.order)] = torch.arange(len(self.order))
        return at

    def segments(self) -> int:
        """Runs of tokens with one shift."""
        shifts = [p - self.stored[s] for p, s in enumerate(self.order)]
        return sum(1 for i, d in enumerate(shifts) if i == 0 or d != shifts[i - 1])


@dataclass
class Log(Slots):
    """Slots of a cache that only appends: `used` of them are written, those of deleted tokens included, and the next ones follow."""

    used: int = 0

    @classmethod
    def fresh(cls, length: int, size: int) -> Self:
        """A text as a prefill leaves it."""
        return cls(size, list(range(length)), list(range(length)), length)

    def room(self) -> int:
        """Slots that were never written."""
        return self.size - self.used

    def take(self, count: int) -> list[int]:
        """The next slots."""
        if count > self.room():
            raise IndexError("no free slot")  # callers make room first
        return list(range(self.used, self.used + count))

    def after(self, plan: Plan, again: Sequence[int] = ()) -> tuple[Self, list[int]]:
        """As for any slots; what is encoded counts as written."""
        slots, encode = super().after(plan, again)
        slots.used += len(encode)
        return slots, encode

    def extended(self, slots: Sequence[int]) -> Self:
        """The text with more tokens at its end."""
        longer = super().extended(slots)
        longer.used += len(slots)
        return longer

    def rows(self, shifts: Sequence[int]) -> Tensor:
        """As for any slots; one that is used no more has the row before it, so that a page keeps one turn where it can."""
        found = super().rows(shifts)
        live, row = set(self.order), 0
        for s in range(self.used):
            if s in live:
                row = int(found[s])
            else:
                found[s] = row
        return found

    def moved(self, to: Sequence[int], used: int) -> Self:
        """The same text where slot s has become slot to[s], or -1 where it holds nothing any more; `used` slots are written then."""
        stored = [0] * self.size
        for old, new in enumerate(to):
            if new >= 0:
                stored[new] = self.stored[old]
        return replace(self, order=[to[s] for s in self.order], stored=stored, used=used)

    def dead(self, page: int, pages: int) -> list[int]:
        """Which of the first `pages` pages of `page` slots hold no token of the text."""
        live = {s // page for s in self.order}
        return [p for p in range(pages) if p not in live]
