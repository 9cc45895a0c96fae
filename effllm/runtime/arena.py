"""Extents of one row of token slots: sequences of any length side by side, each in one contiguous run."""

from __future__ import annotations

from bisect import insort


class Extents:
    """First-fit allocation of runs of slots out of `size`. Numbers only; the tensors that they index live elsewhere."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._taken: list[tuple[int, int]] = []  # (start, length), ascending

    @property
    def free(self) -> int:
        """Slots in no extent."""
        return self.size - sum(n for _, n in self._taken)

    def take(self, length: int) -> int | None:
        """Start of a new extent, None where no gap is long enough."""
        if length < 1:
            raise ValueError(f"an extent of {length} slots")
        at = 0
        for start, taken in self._taken:
            if start - at >= length:
                break
            at = start + taken
        if at + length > self.size:
            return None
        insort(self._taken, (at, length))
        return at

    def extend(self, start: int, length: int) -> bool:
        """Make the extent that starts there at least `length` long, where it lies; False where the next one is in the way. KeyError as `give`."""
        i = self._index(start)
        after = self._taken[i + 1][0] if i + 1 < len(self._taken) else self.size
        if start + length > after:
            return False
        self._taken[i] = (start, max(length, self._taken[i][1]))
        return True

    def give(self, start: int) -> None:
        """Free the extent that starts there; KeyError where none does."""
        del self._taken[self._index(start)]

    def _index(self, start: int) -> int:
        for i, (at, _) in enumerate(self._taken):
            if at == start:
                return i
        raise KeyError(start)
