"""Decisions and reports: what was done at every site, what was not, and why."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Action = Literal["applied", "kept", "failed"]


@dataclass(frozen=True)
class Decision:
    """One site (a graph node or a module) and what happened to it.

    `code` is stable (for example "applied", "no-rule", "grad", "nan"); bytes are of the weight; times are predicted seconds
    per call at one row, None where no model is at hand.
    """

    site: str
    module: str
    action: Action
    code: str
    reason: str
    bytes_before: int = 0
    bytes_after: int = 0
    time_before: float | None = None
    time_after: float | None = None
    kernel: str | None = None
    config: dict[str, Any] = field(default_factory=dict)


@dataclass
class PassReport:
    """What one pass decided, and how long it took."""

    name: str
    decisions: list[Decision] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Report:
    """Everything effllm did to a model or a graph. `str(report)` is a table; `to_dict` is JSON."""

    recipe: str
    passes: list[PassReport] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def decisions(self) -> list[Decision]:
        """All decisions in order."""
        return [d for p in self.passes for d in p.decisions]

    @property
    def applied(self) -> list[Decision]:
        """The sites that were rewritten."""
        return [d for d in self.decisions if d.action == "applied"]

    @property
    def bytes_before(self) -> int:
        """Dense bytes of the rewritten weights."""
        return sum(d.bytes_before for d in self.applied)

    @property
    def bytes_after(self) -> int:
        """Packed bytes of the rewritten weights."""
        return sum(d.bytes_after for d in self.applied)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {"recipe": self.recipe, "passes": [asdict(p) for p in self.passes], "measured": self.measured, "notes": self.notes}

    def to_json(self) -> str:
        """The JSON text of `to_dict`."""
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        lines = [f"effllm report, recipe {self.recipe}"]
        for p in self.passes:
            lines.append(f"pass {p.name}: {len(p.decisions)} sites in {p.seconds:.2f} s")
            merged: dict[tuple[Any, ...], list[Decision]] = {}
            for d in p.decisions:
                # layers of a stack differ only in their index: one line for all of them
                pattern = ".".join("*" if s.isdigit() else s for s in d.module.split("."))
                key = (pattern, d.action, d.code, d.reason, d.kernel, json.dumps(d.config, sort_keys=True))
                merged.setdefault(key, []).append(d)
            for (pattern, action, code, reason, kernel, _), ds in merged.items():
                size = f" {sum(d.bytes_before for d in ds) / 1e6:.2f} -> {sum(d.bytes_after for d in ds) / 1e6:.2f} MB" if action == "applied" else ""
                config = " ".join(f"{k}={v}" for k, v in ds[0].config.items())
                times = _times(ds[0])
                where = f" on {kernel}" if kernel else ""
                lines.append(f"  {action:7s} {len(ds):4d} x {pattern or '(graph)'}{size} {config}{where}{times} [{code}] {reason}".rstrip())
        if self.bytes_before:
            lines.append(f"weights rewritten: {self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB")
        lines += [f"{k}: {v:.4g}" for k, v in self.measured.items()]
        return "\n".join(lines + self.notes)


def _times(d: Decision) -> str:
    if d.time_before is None or d.time_after is None:
        return ""
    return f" {d.time_before * 1e6:.0f} -> {d.time_after * 1e6:.0f} us predicted"
