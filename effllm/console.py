"""Terminal output of the command line: tables, progress with time left, and errors without traceback."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from effllm.errors import EffllmError, OptionError


def out() -> Console:
    """A console on standard output; wide when it is no terminal, so that tables in logs are not cut."""
    console = Console(soft_wrap=False)
    return console if console.is_terminal else Console(width=160)


def show_error(error: EffllmError) -> None:
    """The error's code, cause and next step on standard error."""
    Console(stderr=True, soft_wrap=True).print(f"[red]error[/red] {escape(str(error))}", highlight=False)


@contextmanager
def progress(title: str) -> Iterator[Callable[[str, float], None]]:
    """A function (what, share done) that draws a bar with the time left, or prints one line per step when not interactive."""
    console = Console(stderr=True)
    if not console.is_terminal:
        last = ""

        def line(what: str, share: float) -> None:
            nonlocal last
            if what != last:
                console.print(f"{title}: {what} ({share:.0%})", highlight=False, soft_wrap=True)
            last = what

        yield line
        return
    done = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*done, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(title, total=1.0)
        yield lambda what, share: bar.update(task, description=f"{title}: {what}", completed=share)


def table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """A table, first column left, the others right where all their cells are numbers."""
    made = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        numeric = bool(rows) and all(_numeric(r[i]) for r in rows)
        made.add_column(name, justify="right" if numeric else "left", no_wrap=numeric or i == 0, overflow="fold")
    for row in rows:
        made.add_row(*(escape(cell) for cell in row))
    return made


def profile_table(result: dict[str, Any]) -> Table:
    """The parts of a decoding step."""
    cells = [[p["part"], str(p["calls"]), f"{p['us']:.0f}", f"{p['share']:.1%}", "-" if p["gb_s"] is None else f"{p['gb_s']:.1f}"] for p in result["parts"]]
    whole = sum(p["us"] for p in result["parts"])
    cells.append(["all of it", "1", f"{whole:.0f}", "100.0%", "-"])
    title = f"{result['variant']}: a step takes {result['step_us']:.0f} us on {result['threads']} threads; the parts come to {result['explained']:.1%} of it"
    return table(title, ["part", "calls", "us", "share", "GB/s"], cells)


def bench_table(result: dict[str, Any]) -> Table:
    """The rows of a bench result, fastest torch baseline as the unit of speed."""
    rows = result["rows"]
    best = max((r["decode_tok_s"] for r in rows if r["recipe"] is None), default=None)
    cells = []
    for r in rows:
        low, high = r["decode_tok_s_range"]
        times = f"{r['decode_tok_s'] / best:.2f}" if best else "-"
        quality = "-" if r["perplexity"] is None else f"{r['perplexity']:.2f}"
        cells.append(
            [
                r["variant"],
                f"{r['decode_tok_s']:.1f}",
                f"{low:.0f}..{high:.0f}",
                times,
                f"{r['prefill_tok_s']:.0f}",
                f"{r['weight_bytes'] / 1e6:.1f}",
                f"{r['bits_per_weight']:.2f}",
                f"{r['achieved_gb_s']:.1f}",
                quality,
                r["sample"],
            ]
        )
    about = result["machine"]
    busy = about["other_cores_busy"]
    title = f"{about['cpu']}, {about['threads']} threads, reads {about['read_bandwidth_gb_s']:.0f} GB/s"
    title += "" if busy is None else f", {busy:.2f} cores busy with other work"
    names = ["variant", "decode tok/s", "range", "x best torch", "prefill tok/s", "MB", "bits/weight", "GB/s", "perplexity", "answer"]
    return table(title, names, cells)


def writable(*paths: Path | None) -> None:
    """Raise OptionError (E-OPT-WRITE) before a long run where its result could not be written."""
    for path in paths:
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise OptionError("E-OPT-WRITE", f"cannot write {path}", "give a file name in a folder that exists")


def write_json(data: Any, path: Path | None) -> None:
    """Write a JSON file; OptionError (E-OPT-WRITE) where that is not possible. None writes nothing."""
    if path is not None:
        try:
            path.write_text(json.dumps(data, indent=1, default=str) + "\n")
        except OSError as error:
            raise OptionError("E-OPT-WRITE", f"cannot write {path}: {error}", "give a path in a folder that exists and is writable") from error


def _numeric(cell: str) -> bool:
    return cell in ("", "-") or cell.replace("..", "").replace(".", "").replace("-", "").isdigit()


def doctor(found: dict[str, Any]) -> None:
    """The tables of `effllm doctor`."""
    console = out()
    about = found["machine"] | found["packages"] | {"compiler": found["compiler"] or "none found: the slow reference kernels run", "demo model": found["demo"]}
    console.print(table("machine", ["what", "value"], [[k, _plain(v)] for k, v in about.items()]))
    model = found["cost_model"]
    state = "measured here" if model["calibrated"] else "defaults; effllm doctor --calibrate measures them"
    console.print(table(f"cost model ({state})", ["constant", "value"], [[k, f"{v:.3g}"] for k, v in model["constants"].items()]))
    rows = []
    for r in found["kernels"]:
        state = "used" if r["used"] else ("works" if r["ok"] else "refused")
        rows.append([r["device"], r["activation"], r["kernel"], _range(r["bits"]), state, r["reason"]])
    console.print(table("kernels for a 4096 x 4096 weight, one row", ["device", "activation", "kernel", "bits", "state", "why"], rows))


def notes(result: dict[str, Any]) -> None:
    """What a bench's figures mean, one line each."""
    for key, value in result["settings"].items():
        out().print(f"{key}: {_plain(value)}", highlight=False, markup=False)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
    if isinstance(value, list | tuple):
        return ", ".join(_plain(v) for v in value) or "none"
    return "not installed" if value is None else str(value)


def _range(bits: list[int]) -> str:
    whole = bool(bits) and bits == list(range(bits[0], bits[-1] + 1)) and len(bits) > 1
    return f"{bits[0]}..{bits[-1]}" if whole else ", ".join(map(str, bits))
