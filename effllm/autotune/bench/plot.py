"""Two plots of a kernel benchmark in one PNG: the roofline with our kernels and peers on it, and predicted against measured time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
_OURS = ("#1b7f79", "#d1495b", "#2e4057", "#e3a018", "#6a4c93", "#3a86ff")


def png(result: dict[str, Any], path: Path) -> None:
    """Draw a result of `bench.run` into a PNG file. Raises OSError where it cannot be written."""
    # the object interface: no global state, no display needed
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 6.6), layout="tight")
    left, right = figure.subplots(1, 2)
    rows = [r for r in result["rows"] if r["status"] == "timed"]
    styles = _styles(rows)
    _roofline(left, rows, result["machine"], styles)
    _scatter(right, rows, result["correlation"], styles)
    about = result["machine"]
    where = about["gpus"][0] if result["settings"]["device"] == "cuda" else f"{about['cpu']}, {about['threads']} threads"
    figure.supxlabel(f"{where}, torch {about['torch']}; medians of calls on cold weights", fontsize=9)
    figure.savefig(path, dpi=130, facecolor="white", bbox_inches="tight")


Style = dict[str, Any]


def _styles(rows: list[dict[str, Any]]) -> dict[str, Style]:
    """Our kernels in colours and filled, peers grey and hollow."""
    found: dict[str, Style] = {}
    for kind in ("effllm", "other"):
        names = list(dict.fromkeys(r["name"] for r in rows if (r["kind"] == "effllm") == (kind == "effllm")))
        for i, name in enumerate(names):
            mark = _MARKS[i % len(_MARKS)]
            if kind == "effllm":
                found[name] = {"marker": mark, "c": _OURS[i % len(_OURS)], "s": 38, "zorder": 3}
            else:
                found[name] = {"marker": mark, "facecolors": "none", "edgecolors": "#7d8894", "s": 30}
    return found


def _roofline(axis: Any, rows: list[dict[str, Any]], machine: dict[str, Any], styles: dict[str, Style]) -> None:
    for name, style in styles.items():
        own = [r for r in rows if r["name"] == name]
        axis.scatter([r["intensity"] for r in own], [r["gflops"] for r in own], label=name, **style)
    places = [r["intensity"] for r in rows] or [1.0]
    low, high = min(places) / 1.5, max(places) * 1.5
    band = machine["read_bandwidth_gb_s"]
    tops = {"bf16 product of torch": machine["bf16_gflops"], "fp32 product of torch": machine["fp32_gflops"]}
    constants = machine.get("constants") or {}
    if {"issue", "cores"} <= set(constants):
        tops["int8 dot products (cost model)"] = 128 * constants["issue"] * constants["cores"] / 1e9  # 64 multiply-adds an instruction
    axis.plot([low, high], [band * low, band * high], color="#333333", lw=1)
    axis.annotate(f"{band:.0f} GB/s", (low, band * low), fontsize=8, xytext=(2, 8), textcoords="offset points")
    for name, top in tops.items():
        axis.axhline(top, color="#333333", lw=1, ls="--")
        axis.annotate(f"{name}, {top:.0f} GFLOP/s", (high, top), fontsize=8, ha="right", xytext=(0, 3), textcoords="offset points")
    axis.set(xscale="log", yscale="log", xlabel="flops per byte of weight, activations and output", ylabel="GFLOP/s", title="roofline")
    heights = [r["gflops"] for r in rows] or [1.0]
    axis.set_ylim(min(heights) / 2, max([*heights, *tops.values()]) * 2)
    if styles:
        axis.legend(fontsize=7, ncols=2)


def _scatter(axis: Any, rows: list[dict[str, Any]], correlation: dict[str, Any], styles: dict[str, Style]) -> None:
    known = [r for r in rows if r.get("predicted_us")]
    for name in dict.fromkeys(r["name"] for r in known):
        own = [r for r in known if r["name"] == name]
        axis.scatter([r["predicted_us"] for r in own], [r["us"] for r in own], label=name, **styles[name])
    axis.set(xscale="log", yscale="log", xlabel="predicted, µs", ylabel="measured, µs", title="cost model")
    if not known:
        axis.text(0.5, 0.5, "no predictions", ha="center", transform=axis.transAxes)
        return
    ends = [f(f(r["predicted_us"], r["us"]) for r in known) for f in (min, max)]
    axis.plot(ends, ends, color="#333333", lw=1)
    rank = correlation["all"]["spearman"]
    text = "too few rows for a rank correlation" if rank is None else f"Spearman {rank:.3f} over {correlation['all']['rows']} rows"
    axis.text(0.03, 0.96, text, va="top", transform=axis.transAxes)
    axis.legend(fontsize=7, loc="lower right")
