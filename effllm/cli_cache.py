"""The command group `effllm cache`: what is in the tuning store, why an entry was not used, compaction."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from effllm import console

app = typer.Typer(no_args_is_help=True, help="The tuning store: list it, ask why an entry was not used, compact it.")

Json = Annotated[Path | None, typer.Option("--json", help="write the result to this file")]
Where = Annotated[Path | None, typer.Option("--store", help="directory of the store (default: in the user's cache directory)")]


@app.command("list")
def listing(store: Where = None, json: Json = None) -> None:
    """The best configuration per op, problem and M bucket, with its median time, age and state."""
    from effllm import commands_cache

    console.writable(json)
    result = commands_cache.listing(store)
    names = ["op", "problem", "M", "config", "median us", "tried", "when", "state"]
    console.out().print(console.table(f"{result['store']}, travels: {result['travels']}", names, [_cells(r) for r in result["rows"]]))
    _damage(result)
    console.write_json(result, json)


@app.command()
def why(
    op: Annotated[str, typer.Argument(help="an op, such as bipolar_linear")],
    shape: Annotated[str, typer.Argument(help="field=value parts, such as m=1,n=576,k=1536,bits=4,group=32; what is left out is taken from the entry")],
    store: Where = None,
    json: Json = None,
) -> None:
    """The nearest entry against what is wanted here and now, each differing field with both values."""
    from effllm import commands_cache

    console.writable(json)
    result = commands_cache.why(op, shape, store)
    _say(result["line"])
    if result["entry"] is not None:
        e = result["entry"]
        _say(f"entry: {_pairs(e['problem'])}, M bucket {e['m_bucket']}, {e['provider']}, config {_pairs(e['config'])}, {e['status']}, {_when(e)}")
    if result["differences"]:
        rows = [[d["field"], str(d["wanted"]), str(d["entry"]), d["effect"]] for d in result["differences"]]
        console.out().print(console.table("differing fields", ["field", "wanted", "entry", "effect"], rows))
    _damage(result)
    console.write_json(result, json)


@app.command()
def compact(store: Where = None, json: Json = None) -> None:
    """Keep the newest line per key and configuration; move damaged lines to FILE.damaged."""
    from effllm import commands_cache

    console.writable(json)
    result = commands_cache.compact(store)
    _say(f"{result['store']}: {result['files']} files, {result['kept']} lines kept, {result['dropped']} dropped, {result['damaged']} damaged set aside")
    console.write_json(result, json)


def _cells(row: dict[str, Any]) -> list[str]:
    time_ = "-" if row["seconds"] is None else f"{row['seconds'] * 1e6:.1f}"
    state = row["state"] if row["status"] == "ok" else f"{row['status']}, {row['state']}"
    problem = f"{_pairs(row['problem'])} ({row['provider']})"
    return [row["op"], problem, str(row["m_bucket"]), _pairs(row["config"]), time_, str(row["tried"]), _when(row), state]


def _pairs(values: dict[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in values.items())


def _when(row: dict[str, Any]) -> str:
    return f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime(row['when']))} ({row['age_days']:.0f} d)"


def _damage(result: dict[str, Any]) -> None:
    for line in result["damage"]:
        _say(f"skipped: {line}")


def _say(text: str) -> None:
    console.out().print(text, markup=False, highlight=False, soft_wrap=True)
