"""PNG plots of a bench result and of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_EFFLLM, _BASE = "#1b7f79", "#9aa5b1"


def bench_png(result: dict[str, Any], path: Path) -> None:
    """Three horizontal bar charts over the variants: decode tok/s with its range, weight MB, perplexity (where it was scored)."""
    rows = result["rows"]
    names = [r["variant"] for r in rows]
    charts: list[tuple[str, list[float], str]] = [
        ("decode, tokens/s", [r["decode_tok_s"] for r in rows], "{:.0f}"),
        ("weights read per token, MB", [r["weight_bytes"] / 1e6 for r in rows], "{:.0f}"),
    ]
    if all(r["perplexity"] is not None for r in rows):
        charts.append(("perplexity", [r["perplexity"] for r in rows], "{:.2f}"))
    figure = _figure(4.2 * len(charts) + 1.2, 0.45 * len(rows) + 1.6)
    axes = figure.subplots(1, len(charts), sharey=True, squeeze=False)[0]
    colours = [_BASE if r["recipe"] is None else _EFFLLM for r in rows]
    for axis, (title, values, form) in zip(axes, charts, strict=True):
        bars = axis.barh(names, values, color=colours)
        axis.bar_label(bars, labels=[form.format(v) for v in values], padding=8)
        axis.set_title(title, fontsize=11)
        axis.margins(x=0.22)
        axis.spines[["top", "right"]].set_visible(False)
    low_high = [r["decode_tok_s_range"] for r in rows]
    middle = charts[0][1]
    spans = [[max(0.0, m - lo) for m, (lo, _) in zip(middle, low_high, strict=True)], [max(0.0, hi - m) for m, (_, hi) in zip(middle, low_high, strict=True)]]
    axes[0].errorbar(middle, range(len(rows)), xerr=spans, fmt="none", ecolor="#333333", capsize=3)
    axes[0].invert_yaxis()
    about = result["machine"]
    where = f"{about['cpu']}, {about['threads']} threads, torch {about['torch']}"
    figure.supxlabel(f"{where}; bars are medians, whiskers the range", fontsize=9)
    _save(figure, path)


def eval_png(result: dict[str, Any], path: Path) -> None:
    """One bar chart each for perplexity (beside dense), KL and top-1 agreement; perplexity alone without a dense model."""
    compared = result["kl"] is not None
    figure = _figure(9 if compared else 3.6, 3.2)
    axes = figure.subplots(1, 3 if compared else 1, squeeze=False)[0]
    dense = {"dense": result["dense_perplexity"]} if compared else {}
    bars = {**dense, result["recipe"]: result["perplexity"]}
    axes[0].bar(list(bars), list(bars.values()), color=[_BASE, _EFFLLM][-len(bars) :])
    axes[0].set_title("perplexity")
    if compared:
        axes[1].bar([result["recipe"]], [result["kl"]], color=_EFFLLM, width=0.4)
        axes[1].set_title("KL(dense || model), nats")
        axes[2].bar([result["recipe"]], [result["top1_agreement"]], color=_EFFLLM, width=0.4)
        axes[2].set_ylim(0, 1)
        axes[2].set_title("top-1 agreement")
    for axis in axes:
        for container in axis.containers:
            axis.bar_label(container, fmt="%.4g", padding=2)
        axis.margins(x=0.4, y=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _figure(width: float, height: float) -> Any:
    # the object interface: no global state, no display needed
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="tight")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130, facecolor="white", bbox_inches="tight")
