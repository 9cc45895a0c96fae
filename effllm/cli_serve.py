"""The options of `effllm bench --serve-trace`, what the command does with them, and the command `effllm trace`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from effllm import commands_serve, console
from effllm.errors import OptionError

Trace = Annotated[Path | None, typer.Option("--serve-trace", help="serve the requests of this file (see `effllm trace`) with and without chunked prefill")]
Budget = Annotated[int | None, typer.Option("--budget", min=1, help="tokens per forward with --serve-trace (default: measured, see --slowdown)")]
Most = Annotated[int | None, typer.Option("--sequences", min=1, help="sequences at a time with --serve-trace (default 8)")]
Slowdown = Annotated[float | None, typer.Option("--slowdown", min=1.01, help="what a chunk may do to a decoding step, to choose the budget by (default 1.3)")]

Given = dict[str, Any]  # option -> value, None or False where it was not given


def run(serve: Given, other: Given, model: str | None, recipes: list[str] | None, threads: int | None, device: str, json: Path | None) -> None:
    """Serve a trace. `serve`: the options of this file; `other`: those of other benches. Raises OptionError (E-OPT-SERVE)."""
    wrong = [name for name, value in other.items() if value]
    if wrong or model is None or (recipes and len(recipes) > 1):
        what = f"{', '.join(wrong)} does not go with --serve-trace" if wrong else "--serve-trace needs a MODEL" if model is None else "several recipes"
        raise OptionError("E-OPT-SERVE", what, "give --serve-trace one MODEL and at most one --recipe, and its own options")
    result = commands_serve.serve(
        model, serve["--serve-trace"], recipes[0] if recipes else None, serve["--budget"], serve["--sequences"] or 8, serve["--slowdown"] or 1.3,
        threads, device,
    )  # fmt: skip
    console.out().print(commands_serve.table(result))
    console.write_json(result, json)


def only_with_trace(serve: Given) -> None:
    """Raises OptionError where an option belongs to --serve-trace."""
    wrong = [name for name, value in serve.items() if value is not None]
    if wrong:
        raise OptionError("E-OPT-SERVE", f"{', '.join(wrong)} applies to a trace", "add --serve-trace FILE")


def trace(
    out: Annotated[Path, typer.Argument(help="file to write, one JSON object a line")],
    requests: Annotated[int, typer.Option("--requests", min=1, help="how many")] = 32,
    rate: Annotated[float, typer.Option("--rate", min=1e-6, help="arrivals a second")] = 1.0,
    kind: Annotated[str, typer.Option("--kind", help="chat, code or summary: how long prompts and answers are")] = "chat",
    longest: Annotated[int, typer.Option("--longest", min=1, help="tokens of the longest prompt")] = 2048,
    seed: Annotated[int, typer.Option("--seed", help="same seed, same trace")] = 0,
) -> None:
    """Write a synthetic trace of requests for `effllm bench --serve-trace`."""
    from effllm.runtime import trace as traces

    made = traces.generate(requests, rate, kind, seed, longest)
    traces.write(made, out)
    read, new = sum(a.prompt for a in made), sum(a.new for a in made)
    console.out().print(f"{len(made)} requests over {made[-1].arrival:.1f} s, {read} prompt tokens, {new} new ones", markup=False, highlight=False)
