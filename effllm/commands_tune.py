"""What `effllm tune` does, from plain arguments to a JSON-ready result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from effllm import console
from effllm.autotune.budget import parse_budget
from effllm.errors import OptionError
from effllm.recipe import Recipe


def tune(
    model: str, recipe: str | None, budget: str, prefill: int, threads: int | None, bits: int | None = None, store: Path | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """The dict of tuning.Tuned, plus "machine". A checkpoint is tuned as it is; `recipe` is then for what it left dense.

    Raises EffllmError; options are checked before anything is loaded.
    """
    seconds = parse_budget(budget)
    parsed = Recipe.parse(recipe or "w8")
    import torch

    from effllm import tuning
    from effllm.autotune import machine, machines
    from effllm.hf import models

    if device == "cuda" and not torch.cuda.is_available():
        raise OptionError("E-OPT-DEVICE", "torch sees no GPU here", "use --device cpu")
    if threads is not None:
        torch.set_num_threads(threads)
    with console.progress("tune") as show:
        show("loading", 0.0)
        loaded, _ = models.resolve(model, bits=bits)
        loaded.to(device)
        done = tuning.tune(loaded, parsed, budget=seconds, prefill=prefill, store=store, progress=show)
    return done.to_dict() | {"machine": machine.describe() | {"calibrated": machines.is_calibrated()}, "recipe": parsed.name, "budget_s": seconds}


def table(result: dict[str, Any]) -> Any:
    """The table of the command line."""
    names = ["problem", "in", "calls", "first us", "tuned us", "gain", "of bound", "trials", "new", "config"]
    return console.table(result["summary"], names, [_cells(r) for r in result["rows"]])


def _cells(row: dict[str, Any]) -> list[str]:
    def micro(seconds: float | None) -> str:
        return "-" if seconds is None else f"{seconds * 1e6:.1f}"

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    config = "-" if row["config"] is None else " ".join(f"{k}={v}" for k, v in row["config"].items())
    times = [micro(row["first_s"]), micro(row["tuned_s"]), share(row["gain"]), share(row["bound_share"])]
    return [row["problem"], row["part"], str(row["count"]), *times, str(row["trials"]), str(row["new"]), config]
