"""Spearman's rank correlation, and the groups of rows that it is printed for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from effllm.autotune.space import ranks


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank correlation of two lists of equal length; None for fewer than three pairs or where one list is constant."""
    if len(a) < 3:
        return None
    ra, rb = ranks(a), ranks(b)
    middle = (len(a) - 1) / 2
    both = sum((p - middle) * (q - middle) for p, q in zip(ra, rb, strict=True))
    own = sum((p - middle) ** 2 for p in ra) * sum((q - middle) ** 2 for q in rb)
    return both / own**0.5 if own else None


def by_group(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | int | None]]:
    """Predicted against measured, over all timed rows that have a prediction, by kernel, by M and by path.

    Each group: `rows`, `spearman`, and `measured_over_predicted`, the median ratio (1: the scale is right too).
    """
    known = [r for r in rows if r.get("predicted_us") and r.get("us")]
    keys: list[Callable[[dict[str, Any]], str]] = [
        lambda r: "all",
        lambda r: str(r["name"]),
        lambda r: f"M={r['m']}",
        lambda r: f"path {(r.get('config') or {}).get('path', 'fixed')}",
    ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for key in keys:
        for row in known:
            groups.setdefault(key(row), []).append(row)
    return {name: _summary(group) for name, group in groups.items()}


def _summary(group: list[dict[str, Any]]) -> dict[str, float | int | None]:
    ratios = sorted(r["us"] / r["predicted_us"] for r in group)
    rank = spearman([r["predicted_us"] for r in group], [r["us"] for r in group])
    return {"rows": len(group), "spearman": rank, "measured_over_predicted": ratios[len(ratios) // 2]}
