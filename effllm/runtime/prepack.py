"""Prepacking: prompts of different lengths concatenated into few sequences, so that a prefill computes no padding (arXiv:2404.09529).

A bin is one sequence of whole prompts; no prompt is split. Attention is block-diagonal and causal (runtime/segments.py has the table
that says so without a mask), and positions restart at 0 with each prompt, so every prompt's keys and values are those of a run alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effllm.errors import PromptError
from effllm.runtime.segments import Segment

NODES = 200_000  # of the exact search; about a second of Python


@dataclass(frozen=True)
class Place:
    """Where a prompt lies: tokens start .. start + length of bin `bin`."""

    prompt: int
    bin: int
    start: int
    length: int


@dataclass(frozen=True)
class Packing:
    """Prompts laid out in bins. `places[i]` is prompt i's, whatever order the bins hold them in. `proven`: no packing has fewer bins."""

    prompts: tuple[Tensor, ...]
    capacity: int
    bins: tuple[tuple[int, ...], ...]
    places: tuple[Place, ...]
    proven: bool

    def ids(self, bin: int) -> Tensor:
        """Token ids (1, T) of a bin, its prompts end to end."""
        return torch.cat([self.prompts[i] for i in self.bins[bin]])[None]

    def positions(self, bin: int) -> Tensor:
        """Positions (1, T), from 0 in every prompt."""
        return torch.cat([torch.arange(len(self.prompts[i])) for i in self.bins[bin]])[None]

    def segments(self, bin: int) -> list[Segment]:
        """One segment a prompt, for keys that lie where the queries do."""
        return [Segment(p.start, p.length, p.start, p.length) for p in (self.places[i] for i in self.bins[bin])]

    def last(self, bin: int) -> Tensor:
        """Index of each prompt's last token in the bin, in the bin's order."""
        return torch.tensor([self.places[i].start + self.places[i].length - 1 for i in self.bins[bin]])

    @property
    def tokens(self) -> int:
        """Tokens of all prompts, which is what a packed prefill computes."""
        return sum(p.length for p in self.places)

    @property
    def padded_tokens(self) -> int:
        """Tokens that a batch padded to its longest prompt computes."""
        return len(self.places) * max((p.length for p in self.places), default=0)


def prepack(prompts: Sequence[Tensor | Sequence[int]], capacity: int | None = None, exact: bool = False) -> Packing:
    """Lay prompts (token ids, 1-D) out in bins of at most `capacity` tokens (default: the longest prompt).

    First-fit decreasing, at most 11/9 of the fewest possible bins + 6/9. `exact` searches for the fewest, which is for some dozens of
    prompts: it stops after a second and keeps the best found, and `Packing.proven` says whether that is the fewest. Raises PromptError
    (E-PRM-EMPTY, E-PRM-IDS, E-PRM-CAPACITY).
    """
    rows = tuple(checked(p, i) for i, p in enumerate(prompts))
    lengths = [len(r) for r in rows]
    capacity = max(lengths, default=1) if capacity is None else capacity
    bins, proven = plan(lengths, capacity, exact)
    places: list[Place | None] = [None] * len(rows)
    for b, members in enumerate(bins):
        start = 0
        for i in members:
            places[i] = Place(i, b, start, lengths[i])
            start += lengths[i]
    return Packing(rows, capacity, tuple(map(tuple, bins)), tuple(p for p in places if p is not None), proven)


def checked(prompt: Tensor | Sequence[int], index: int, vocabulary: int | None = None) -> Tensor:
    """A prompt as an int64 vector on the CPU, its ids below `vocabulary`. Raises PromptError (E-PRM-EMPTY, E-PRM-IDS)."""
    try:
        ids = prompt.detach().cpu() if isinstance(prompt, Tensor) else torch.tensor(list(prompt), dtype=None if len(prompt) else torch.int64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PromptError("E-PRM-IDS", f"prompt {index} is no list of token ids: {error}", "give token ids, or text with a tokenizer") from error
    if ids.dim() == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.dim() != 1 or ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise PromptError("E-PRM-IDS", f"prompt {index} is {tuple(ids.shape)} of {ids.dtype}", "give each prompt as a vector of token ids")
    if not len(ids):
        raise PromptError("E-PRM-EMPTY", f"prompt {index} has no token", "leave it out, or begin it with the model's start token")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        wrong = low if low < 0 else high
        raise PromptError("E-PRM-IDS", f"prompt {index} has the id {wrong}, and the model knows {vocabulary or 'ids from 0'}", "use the model's own tokenizer")
    return ids.to(torch.int64)


def plan(lengths: Sequence[int], capacity: int, exact: bool = False) -> tuple[list[list[int]], bool]:
    """Indices of `lengths` in bins whose sums stay within `capacity`, and whether no packing has fewer. Raises PromptError (E-PRM-CAPACITY)."""
    for i, n in enumerate(lengths):
        if n > capacity:
            step = "raise the capacity; a prompt is never split (chunked prefill does that: effllm.hf.serving)"
            raise PromptError("E-PRM-CAPACITY", f"prompt {i} has {n} tokens, and a bin holds {capacity}", step)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])  # stable: equal lengths keep their order
    bins: list[list[int]] = []
    free: list[int] = []
    for i in order:
        at = next((b for b, room in enumerate(free) if room >= lengths[i]), len(bins))
        if at == len(bins):
            bins.append([])
            free.append(capacity)
        bins[at].append(i)
        free[at] -= lengths[i]
    least = lower_bound(lengths, capacity)
    if len(bins) <= least or not exact:
        return bins, len(bins) <= least
    better, proven = _search([lengths[i] for i in order], capacity, len(bins), least)
    return ([[order[j] for j in b] for b in better] if better else bins), proven


def lower_bound(lengths: Sequence[int], capacity: int) -> int:
    """Bins that any packing needs: Martello and Toth's L2, which counts what cannot share a bin, and at least the sum over the capacity."""
    best = -(-sum(lengths) // capacity) if lengths else 0
    for k in {n for n in lengths if 2 * n <= capacity} | {0}:
        alone = [n for n in lengths if n > capacity - k]
        large = [n for n in lengths if capacity - k >= n > capacity / 2]
        small = sum(n for n in lengths if capacity / 2 >= n >= k)
        spill = small - (len(large) * capacity - sum(large))
        best = max(best, len(alone) + len(large) + max(0, -(-spill // capacity)))
    return best


def _search(sizes: list[int], capacity: int, most: int, least: int) -> tuple[list[list[int]] | None, bool]:
    """Fewer than `most` bins for sizes in descending order: depth first, one bin per distinct remaining room. (bins or None, proven)."""
    left = [0] * (len(sizes) + 1)  # tokens from item i on
    for i in range(len(sizes) - 1, -1, -1):
        left[i] = left[i + 1] + sizes[i]
    found: list[list[int]] | None = None
    best, visited = most, 0
    bins: list[list[int]] = []
    room: list[int] = []

    def place(i: int) -> bool:
        """True to stop: the bound is met or the search is too long."""
        nonlocal found, best, visited
        visited += 1
        if visited > NODES:
            return True
        if i == len(sizes):
            found, best = [list(b) for b in bins], len(bins)
            return best <= least
        if len(bins) + max(0, -(-(left[i] - sum(room)) // capacity)) >= best:
            return False
        for b in sorted({r: b for b, r in enumerate(room) if r >= sizes[i]}.values(), key=lambda b: room[b]):
            bins[b].append(i)
            room[b] -= sizes[i]
            stop = place(i + 1)
            room[b] += sizes[i]
            bins[b].pop()
            if stop:
                return True
        if len(bins) + 1 < best:
            bins.append([i])
            room.append(capacity - sizes[i])
            stop = place(i + 1)
            bins.pop()
            room.pop()
            return stop
        return False

    place(0)
    return found, best <= least or visited <= NODES
