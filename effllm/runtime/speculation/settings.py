"""What a user says about speculation, in one line: "chain(tokens=4)", "chain(tokens=8, stop=0.4)", "constant(branching=3x2x1)",
"beam(width=4, depth=3)"."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from effllm.errors import OptionError, nearest

_KEYS = {"chain": ("tokens", "least", "stop"), "constant": ("branching",), "beam": ("width", "depth")}


@dataclass(frozen=True)
class Speculation:
    """`shape` "chain": up to `tokens` drafted tokens, at least `least`; `stop`: the threshold of SpecDec++ in [0, 1], None for always `tokens`.
    "constant": `branching[l]` children for every node of level l (RSD-C). "beam": `width` nodes a level, `depth` levels (RSD-S).

    `head`: an AcceptanceHead for the draft model, asked where `stop` is set; without one the draft's own probability of each token stands in.
    """

    shape: str = "chain"
    tokens: int = 4
    least: int = 1
    stop: float | None = None
    branching: tuple[int, ...] = (2, 2, 1)
    width: int = 3
    depth: int = 3
    head: Any = None

    def __post_init__(self) -> None:
        """Raises OptionError (E-OPT-SPECULATION)."""
        if self.shape not in _KEYS:
            raise _error(f"unknown shape {self.shape!r}", nearest(self.shape, _KEYS))
        wrong = [f"{n} = {v}" for n, v in (("tokens", self.tokens), ("least", self.least), ("width", self.width), ("depth", self.depth)) if v < 1]
        wrong += [f"branching = {self.branching}"] if not self.branching or min(self.branching) < 1 else []
        wrong += [f"stop = {self.stop}"] if self.stop is not None and not 0 <= self.stop <= 1 else []
        wrong += [f"least = {self.least} above tokens = {self.tokens}"] if self.least > self.tokens else []
        if wrong:
            raise _error("; ".join(wrong), "counts are 1 or more, stop is between 0 and 1")
        if self.head is not None and (self.shape != "chain" or self.stop is None):
            raise _error("a head without a stop threshold has nothing to decide", 'use Speculation("chain", stop=0.3, head=head)')

    @staticmethod
    def parse(given: Speculation | str | int | None) -> Speculation:
        """A Speculation, its one-line form, or a number of chained tokens. Raises OptionError (E-OPT-SPECULATION)."""
        if isinstance(given, Speculation):
            return given
        if given is None:
            return Speculation()
        if isinstance(given, int):
            return Speculation(tokens=given)
        found = re.fullmatch(r"\s*([a-z]+)\s*(?:\((.*)\))?\s*", given)
        if found is None:
            raise _error(f"cannot read {given!r}", 'write "chain(tokens=4)", "constant(branching=2x2x1)" or "beam(width=3, depth=3)"')
        shape, inside = found[1], found[2] or ""
        if shape not in _KEYS:
            raise _error(f"unknown shape {shape!r}", nearest(shape, _KEYS))
        values: dict[str, Any] = {}
        for item in filter(None, (part.strip() for part in inside.split(","))):
            key, _, text = (s.strip() for s in item.partition("="))
            if key not in _KEYS[shape]:
                raise _error(f"{shape} has no setting {key!r}", nearest(key, _KEYS[shape]))
            try:
                values[key] = float(text) if key == "stop" else tuple(int(b) for b in text.split("x")) if key == "branching" else int(text)
            except ValueError as error:
                raise _error(f"{key} = {text!r}", "give a number; branching is numbers joined by x, such as 3x2x1") from error
        return Speculation(shape, **values)

    @property
    def levels(self) -> int:
        """Most drafted tokens of a path."""
        return {"chain": self.tokens, "constant": len(self.branching), "beam": self.depth}[self.shape]

    def nodes(self, levels: int) -> int:
        """Most nodes of a tree of that many levels, the root included."""
        if self.shape == "chain":
            return 1 + levels
        if self.shape == "beam":
            return 1 + self.width * levels
        return 1 + sum(math.prod(self.branching[: n + 1]) for n in range(levels))

    def level_width(self, level: int) -> int:
        """Most nodes of a level; level 0 is the root."""
        if level == 0 or self.shape == "chain":
            return 1
        return self.width if self.shape == "beam" else math.prod(self.branching[:level])


def _error(cause: str, step: str) -> OptionError:
    return OptionError("E-OPT-SPECULATION", cause, step)
