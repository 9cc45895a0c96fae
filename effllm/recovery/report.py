"""What a recovery did: the parameters it trained, the course of the losses, the speed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class RecoveryReport:
    """`history`: per step total, kl, lm, features (unweighted, before the step), the gradient's norm in units of the parameters'
    sizes, and the learning rate. `seconds` and `tokens` are of this call; a resumed run counts from where it went on. `ranks`:
    ranks left of each low-rank weight where they were pruned. `refit`: by low-rank weight, the share of its output's residual (squared)
    that the closed-form fit explained."""

    what: str
    trained: int
    share: float
    parameters: str
    steps: int
    precision: str
    head: str
    features: tuple[str, ...]
    seconds: float = 0.0
    tokens: int = 0
    resumed_from: int = 0
    ranks: dict[str, int] = field(default_factory=dict)
    refit: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def mean(self, loss: str, last: int | None = None) -> float:
        """Mean of a loss over the first (negative `last`) or last steps; all where None. NaN where it was not measured."""
        values = [h[loss] for h in self.history if h.get(loss) is not None]
        part = values if last is None else values[-last:] if last > 0 else values[:-last]
        return sum(part) / len(part) if part else float("nan")

    @property
    def rose(self) -> bool:
        """Whether the last tenth of the steps had a loss over 5 % above that of the first tenth; too short a run says nothing."""
        few = len(self.history) // 10
        return few >= 2 and self.mean("total", few) > 1.05 * self.mean("total", -few)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return asdict(self)

    def to_json(self) -> str:
        """The JSON text of `to_dict`."""
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        few = max(1, min(20, len(self.history) // 4))
        speed = self.tokens / max(self.seconds, 1e-9)
        lines = [f"recovery: {self.steps} steps, {self.tokens} tokens in {self.seconds:.1f} s ({speed:.0f} per second), {self.precision}", self.parameters]
        for loss in ("total", "kl", "lm", "features"):
            before, after = self.mean(loss, -few), self.mean(loss, few)
            if before == before:
                lines.append(f"{loss}: {before:.4f} (first {few} steps) -> {after:.4f} (last {few})")
        if self.refit:
            lines.append(f"closed form: {len(self.refit)} weights, {sum(self.refit.values()) / len(self.refit):.1%} of a residual explained on average")
        if self.ranks:
            lines.append("ranks left: " + ", ".join(f"{n} {r}" for n, r in self.ranks.items()))
        return "\n".join(lines + self.notes)
