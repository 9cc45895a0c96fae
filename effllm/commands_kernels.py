"""What `effllm bench --kernels` does, from plain arguments to a JSON-ready result."""

from __future__ import annotations

import json as jsons
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effllm import commands, console
from effllm.errors import OptionError

CROWDED = 0.1  # cores that other processes may take while a shape is timed


def bench(
    models: Sequence[str] | None, bits: Sequence[int] | None, rows: Sequence[int] | None, ops: Sequence[str] | None, peers: Sequence[str] | None,
    group: int, seconds: float, threads: int | None, device: str, json: Path | None = None,
    resume: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The result of `autotune.bench.run`, written to `json` after every shape; `resume` goes on where that file ends.

    None stands for the plan's default; `models` may hold "all"."""
    from effllm.autotune import shapes
    from effllm.autotune.bench import run as harness
    from effllm.runtime.formats import bipolar

    if group not in (bipolar.CHANNEL, *bipolar.GROUPS):
        raise OptionError("E-OPT-VALUE", f"--group {group}", f"valid: {', '.join(map(str, (bipolar.CHANNEL, *bipolar.GROUPS)))} (0: one scale per output)")
    commands.use_threads(threads)
    chosen: dict[str, Any] = {"bits": bits, "rows": rows, "ops": ops, "peers": peers}
    if models:
        chosen["models"] = list(shapes.MODELS) if "all" in models else [shapes.find(m)[0] for m in models]
    given = {k: tuple(dict.fromkeys(v)) for k, v in chosen.items() if v}
    before = finished(json) if resume else None
    plan = harness.Plan(**given, group=group, device=commands.device_of(device), seconds=seconds)
    with console.progress("kernels") as show:
        return harness.run(plan, show, lambda so_far: console.write_json(so_far, json), before)


def finished(path: Path | None) -> dict[str, Any] | None:
    """What an earlier run left in its file; None where there is none yet. Raises OptionError (E-OPT-RESUME)."""
    if path is None:
        raise OptionError("E-OPT-RESUME", "--resume without a file", "add --json FILE, the file of the run that was stopped")
    try:
        found: dict[str, Any] = jsons.loads(path.read_text())
        return found if found["rows"] or found["settings"] else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError("E-OPT-RESUME", f"{path} holds no result to go on with: {error}", "give the file of a stopped run, or leave --resume out") from error


def draw(result: dict[str, Any], path: Path | None) -> None:
    """Roofline and scatter into a PNG. Raises OptionError (E-OPT-WRITE)."""
    if path is None:
        return
    from effllm.autotune.bench import plot

    try:
        plot.png(result, path)
    except OSError as error:
        raise OptionError("E-OPT-WRITE", f"cannot write {path}: {error}", "give a path in a folder that exists and is writable") from error


def drawable(path: Path | None) -> None:
    """Raise OptionError (E-OPT-WRITE) before a long run for a file that is not a PNG."""
    if path is not None and path.suffix != ".png":
        raise OptionError("E-OPT-WRITE", f"{path} does not end in .png", "give a file name that ends in .png")


def show(result: dict[str, Any]) -> None:
    """Tables of the rows, and lines on missing peers, on what was left out, and on the cost model."""
    out = console.out()
    about = result["machine"]
    where = about["gpus"][0] if result["settings"]["device"] == "cuda" else f"{about['cpu']}, {about['threads']} threads"
    title = f"{where}, reads {about['read_bandwidth_gb_s']:.0f} GB/s"
    if about["other_cores_busy"] is not None:
        title += f", {about['other_cores_busy']:.2f} cores busy with other work"
    names = ["layer, N x K", "M", "kernel", "us", "quartiles", "GB/s", "% of bound", "predicted", "x torch bf16", "x best peer", "best peer"]
    for model in dict.fromkeys(r["model"] for r in result["rows"]):
        own = [r for r in result["rows"] if r["model"] == model and r["status"] == "timed"]
        out.print(console.table(f"{model} on {title}", names, [_cells(r) for r in own]))
    out.print("versions: " + ", ".join(f"{p['name']} {p['version']}" for p in result["peers"] if p["version"]), markup=False, highlight=False)
    for line in lines(result):
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def lines(result: dict[str, Any]) -> list[str]:
    """One line each: wrong or failed rows, missing peers, shapes left out (once per name and reason), rank correlations."""
    found = [f"{r['name']} {r['n']}x{r['k']} M={r['m']}: {r['status']}, {r['reason']}" for r in result["rows"] if r["status"] != "timed"]
    for p in result["peers"]:
        if p["missing"]:
            found.append(f"{p['name']} is missing: {p['missing']}" + (f"; {p['install']}" if p["install"] else ""))
    left: dict[tuple[str, str], list[str]] = {}
    for s in result["skipped"]:
        at = f"{s['n']}x{s['k']}" + (f" M={s['m']}" if "m" in s else "")
        left.setdefault((s["name"], s["reason"]), []).append(at)
    found += [f"{name}, left out at {', '.join(places)}: {reason}" for (name, reason), places in left.items()]
    crowded = {(r["n"], r["k"], r["m"]): r["other_cores_busy"] for r in result["rows"] if (r.get("other_cores_busy") or 0) > CROWDED}
    if crowded:
        places = ", ".join(f"{n}x{k} M={m} ({busy:.2f} cores)" for (n, k, m), busy in crowded.items())
        found.append(f"not to be trusted, other work took processor time: {places}")
    if "calibrated" in result["machine"] and not result["machine"]["calibrated"]:
        found.append("predictions and bounds use default constants of a CPU: calibrate the machine first (effllm doctor --calibrate)")
    for name, group in result["correlation"].items():
        rank = "too few rows" if group["spearman"] is None else f"{group['spearman']:.3f}"
        found.append(f"cost model, {name}: Spearman {rank}, measured / predicted {group['measured_over_predicted']:.2f} ({group['rows']} rows)")
    return found


def _cells(r: dict[str, Any]) -> list[str]:
    low, high = r["us_quartiles"]

    def share(key: str, form: str, by: float = 1) -> str:
        return form.format(by * r[key]) if r.get(key) is not None else "-"

    return [
        f"{'/'.join(r['layers'])}, {r['n']} x {r['k']}", str(r["m"]), r["name"],
        f"{r['us']:.1f}", f"{low:.1f}..{high:.1f}", f"{r['gb_s']:.1f}", share("of_bound", "{:.0f}", 100), share("predicted_us", "{:.1f}"),
        share("times_torch_bf16", "{:.2f}"), share("times_best_peer", "{:.2f}"), r.get("best_peer", "-"),
    ]  # fmt: skip
