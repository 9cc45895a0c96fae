"""The options of `effllm bench --kernels`, and what the command does with them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from effllm import commands_kernels, console
from effllm.errors import OptionError

Kernels = Annotated[bool, typer.Option("--kernels", help="time kernels on layer shapes of real models instead of a MODEL")]
Shapes = Annotated[list[str] | None, typer.Option("--model-shapes", help="whose layer shapes: a model's name, several, or all (default SmolLM2-135M)")]
Rows = Annotated[list[int] | None, typer.Option("--rows", min=1, help="rows of the activations; several (default 1, 16, 512)")]
Ops = Annotated[list[str] | None, typer.Option("--op", help="an op to time; several (default all)")]
Peers = Annotated[list[str] | None, typer.Option("--peers", help="a peer's kernel beside torch's; several, all (default) or none")]
Group = Annotated[int | None, typer.Option("--group", min=0, help="columns that share a scale (default 32)")]
Seconds = Annotated[float | None, typer.Option("--seconds", min=0.01, help="timing per shape and rows (default 2)")]
Resume = Annotated[bool | None, typer.Option("--resume", help="go on with the run whose result --json names: shapes it has are not timed again")]
Widths = Annotated[list[int] | None, typer.Option("--bits", min=1, max=8, help="read a checkpoint at this many bits; with --kernels: widths (default 8, 4)")]

Given = dict[str, Any]  # option -> value, None or False where it was not given


def run(kernels: Given, model: Given, threads: int | None, device: str, json: Path | None, png: Path | None) -> None:
    """Time kernels. `kernels`: the options of this file; `model`: those that only a model's bench takes. Raises OptionError (E-OPT-KERNELS)."""
    wrong = [name for name, value in model.items() if value]
    if wrong:
        raise OptionError("E-OPT-KERNELS", f"--kernels times kernels and no model, so {', '.join(wrong)} does not apply", "leave one of them out")
    commands_kernels.drawable(png)
    result = commands_kernels.bench(
        kernels["--model-shapes"], kernels["--bits"], kernels["--rows"], kernels["--op"], kernels["--peers"],
        32 if kernels["--group"] is None else kernels["--group"], kernels["--seconds"] or 2.0, threads, device, json, bool(kernels["--resume"]),
    )  # fmt: skip
    commands_kernels.show(result)
    console.write_json(result, json)
    commands_kernels.draw(result, png)


def only_with_kernels(kernels: Given, bits: list[int] | None) -> int | None:
    """The single width of a model's bench. Raises OptionError where an option belongs to --kernels, or several widths were given."""
    wrong = [name for name, value in kernels.items() if value is not None and name != "--bits"]
    if wrong:
        raise OptionError("E-OPT-KERNELS", f"{', '.join(wrong)} applies to the bench of kernels", "add --kernels and leave MODEL out")
    if bits and len(bits) > 1:
        raise OptionError("E-OPT-VALUE", f"--bits {' and '.join(map(str, bits))}: a checkpoint is read at one width", "give one, or add --kernels")
    return bits[0] if bits else None
