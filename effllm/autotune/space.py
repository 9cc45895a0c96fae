"""The configurations of a problem as a space: ranked by predicted time, with a diverse start, and neighbours in each field."""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Callable, Iterable, Sequence

from effllm.lowering.op import Config

_HOPELESS = 16.0  # times the best prediction: not worth a trial for diversity's sake


def text_of(config: Config) -> str:
    """A configuration as canonical JSON, as the store names it."""
    return json.dumps(dict(config), sort_keys=True)


class Space:
    """Legal configurations, the one predicted fastest first."""

    def __init__(self, configs: Iterable[Config], predict: Callable[[Config], float]) -> None:
        priced = {text_of(c): (predict(c), c) for c in configs}
        self._priced = priced
        self.ranked: list[Config] = [c for _, c in sorted(priced.values(), key=lambda pair: pair[0])]
        self._fields = sorted({f for c in self.ranked for f in c})
        self._place = {text_of(c): i for i, c in enumerate(self.ranked)}

    def __contains__(self, text: str) -> bool:
        return text in self._priced

    def predicted(self, config: Config) -> float:
        """Seconds by the cost model."""
        return self._priced[text_of(config)][0]

    def place(self, config: Config) -> int | None:
        """A configuration's place in `ranked`; None for one that is not legal."""
        return self._place.get(text_of(config))

    def start(self, first: Config | None, top: int, diverse: int) -> list[Config]:
        """The model's `first` choice, the `top` best ranked, and `diverse` that differ from all of those in as many fields as possible.

        A field of words, such as the path, counts most: another algorithm is what a wrong model most easily misjudges.
        """
        chosen = list(self.ranked[:top])
        if first is not None and text_of(first) in self._priced:
            chosen = [first, *(c for c in chosen if text_of(c) != text_of(first))]
        have = {text_of(c) for c in chosen}
        hope = [c for c in self.ranked if self.predicted(c) <= _HOPELESS * self.predicted(self.ranked[0]) and text_of(c) not in have]
        for _ in range(min(diverse, len(hope))):
            # the ranking breaks ties: max keeps the first
            far = max(hope, key=lambda c: min(self._apart(c, other) for other in chosen))
            chosen.append(far)
            hope.remove(far)
        return chosen

    def _apart(self, a: Config, b: Config) -> float:
        return sum((100.0 if isinstance(a.get(f), str) else 1.0) for f in self._fields if a.get(f) != b.get(f))

    def neighbours(self, config: Config) -> list[Config]:
        """Per field the nearest legal configurations with the next smaller and the next larger value (a word: each other one)."""
        found: dict[str, Config] = {}
        for f in self._fields:
            for value in self._next(config, f):
                # where no other field may stay as it is, as few as possible change, by as little as possible
                near = min((c for c in self.ranked if c.get(f) == value), key=lambda c: (self._changed(c, config, f), self.predicted(c)))
                if self.predicted(near) <= _HOPELESS * self.predicted(self.ranked[0]):
                    found[text_of(near)] = near
        return sorted(found.values(), key=self.predicted)

    def _next(self, config: Config, f: str) -> list[object]:
        values = {c.get(f) for c in self.ranked} - {None}  # a field that only other paths have
        here = config.get(f)
        if here is None:
            return []
        if isinstance(here, str) or not all(isinstance(v, int | float) for v in values):
            return sorted((v for v in values if v != here), key=str)
        steps: list[float] = sorted(values)  # type: ignore[type-var, arg-type]
        at = bisect.bisect_left(steps, here)  # type: ignore[type-var]
        return [steps[i] for i in (at - 1, at + 1) if 0 <= i < len(steps)]

    def _changed(self, a: Config, b: Config, without: str) -> tuple[int, float]:
        others = [f for f in self._fields if f != without and a.get(f) != b.get(f)]
        steps = 0.0
        for f in others:
            x, y = a.get(f), b.get(f)
            if isinstance(x, int | float) and isinstance(y, int | float) and x > 0 and y > 0:
                steps += abs(math.log2(x / y))
            else:
                steps += 4.0
        return len(others), steps


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0; equal values share the mean of theirs."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    found = [0.0] * len(values)
    i = 0
    while i < len(order):
        j = i
        while j + 1 < len(order) and values[order[j + 1]] == values[order[i]]:
            j += 1
        for at in order[i : j + 1]:
            found[at] = (i + j) / 2
        i = j + 1
    return found


def spearman(pairs: Iterable[tuple[float, float]]) -> float:
    """Rank correlation of pairs; 1 where one side does not vary, since it then claims no order."""
    xs, ys = zip(*pairs, strict=True)
    a, b = ranks(xs), ranks(ys)
    ma, mb = sum(a) / len(a), sum(b) / len(b)
    top = sum((x - ma) * (y - mb) for x, y in zip(a, b, strict=True))
    low = math.sqrt(sum((x - ma) ** 2 for x in a) * sum((y - mb) ** 2 for y in b))
    return top / low if low else 1.0
