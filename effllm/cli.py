"""The command `effllm`: compress, eval, bench, trace, explain, tune, doctor, demo, cache. Thin: every command calls one function and prints its result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from effllm import cli_cache, cli_kernels, cli_serve, commands, console
from effllm.errors import EffllmError, OptionError, nearest

# typer's own copy of click or the real one, depending on its version: reached through its public class
_ClickError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


class _Group(TyperGroup):
    """Prints our errors, and turns the parser's into OptionError; both end with exit code 2."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        standalone = kwargs.get("standalone_mode", True)
        kwargs["standalone_mode"] = False
        try:
            code = super().main(*args, **kwargs)
        except EffllmError as error:
            console.show_error(error)
            raise SystemExit(2) from None
        except _ClickError as error:
            if type(error).__name__ != "NoArgsIsHelpError":  # the help is printed already
                console.show_error(self._option_error(error))
            raise SystemExit(2) from None
        except typer.Abort:
            raise SystemExit(130) from None
        if standalone:
            raise SystemExit(code if isinstance(code, int) else 0)
        return code

    def _option_error(self, error: Exception) -> OptionError:
        tell = getattr(error, "format_message", None)
        cause = str(tell() if tell is not None else error)
        wrong = getattr(error, "option_name", None)
        context = getattr(error, "ctx", None)
        if wrong and context is not None:
            names = [o for p in context.command.params for o in p.opts if o.startswith("--")]
            return OptionError("E-OPT-KEY", f"unknown option {wrong!r}", nearest(str(wrong), names))
        if "No such command" in cause:
            word = cause.split("'")[1] if "'" in cause else ""
            group = getattr(getattr(context, "command", None), "commands", self.commands)
            return OptionError("E-OPT-COMMAND", f"unknown command {word!r}", nearest(word, group))
        command = getattr(context, "command_path", "effllm") if context is not None else "effllm"
        return OptionError("E-OPT-VALUE", cause.rstrip(".") or "no command was given", f"see `{command} --help`")


app = typer.Typer(cls=_Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Makes language models small and fast.")
app.add_typer(cli_cache.app, name="cache")
app.command()(cli_serve.trace)

Model = Annotated[str, typer.Argument(help="a Hugging Face directory, an effllm checkpoint directory, or the word demo")]
Bits = Annotated[int | None, typer.Option("--bits", min=1, max=8, help="read a checkpoint's weights at this many bits where they have more")]
Reference = Annotated[str | None, typer.Option("--reference", help="the dense model of a checkpoint, to compare to: a Hugging Face directory or the word demo")]
_RECIPE = typer.Option("--recipe", help='for example w8 (the default), w4, w4a8, "bipolar(bits=3, group=64)", or a TOML or JSON file')
Json = Annotated[Path | None, typer.Option("--json", help="write the result to this file")]
Png = Annotated[Path | None, typer.Option("--png", help="draw the result into this file")]
Calibrate = Annotated[Path | None, typer.Option("--calibrate", help="text file for solvers that calibrate")]
Text = Annotated[Path | None, typer.Option("--text", help="text file to score; for MODEL demo the default is Wikipedia prose")]
Windows = Annotated[int | None, typer.Option("--windows", min=1, help="score at most this many windows of 512 tokens")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads")]
Device = Annotated[str, typer.Option("--device", help="cpu or cuda")]


@app.command()
def compress(
    model: Model,
    out: Annotated[Path, typer.Argument(help="directory for the checkpoint")],
    recipe: Annotated[str, _RECIPE] = "w8",
    calibrate: Calibrate = None,
    strict: Annotated[bool, typer.Option("--strict", help="fail where a module that a rule covers cannot be packed")] = False,
    json: Json = None,
) -> None:
    """Pack MODEL by a recipe and write a checkpoint to OUT."""
    console.writable(json)
    result = commands.compress(model, out, recipe, calibrate, strict)
    console.out().print(result.pop("text"), markup=False, highlight=False, soft_wrap=True)
    console.write_json(result, json)


@app.command("eval")
def evaluate(
    model: Model,
    recipe: Annotated[str | None, _RECIPE] = None,
    bits: Bits = None,
    reference: Reference = None,
    text: Text = None,
    calibrate: Calibrate = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="length of the compressed prompt for recipes with a kv part")] = 1536,
    windows: Windows = None,
    threads: Threads = None,
    json: Json = None,
    png: Png = None,
) -> None:
    """Perplexity, KL and top-1 agreement to the dense model on a text. A checkpoint is scored as it is."""
    console.writable(json, png)
    result = commands.evaluate(model, recipe, text, calibrate, prompt_tokens, windows, threads, bits, reference)
    rows = [[k, f"{v:.6g}" if isinstance(v, float) else str(v)] for k, v in result.items() if v is not None and k != "comparison"]
    console.out().print(console.table(f"{model}, {result['recipe']}", ["figure", "value"], rows))
    if "comparison" in result:
        console.out().print(result["comparison"], markup=False, highlight=False)
    console.write_json(result, json)
    commands.draw("eval_png", result, png)


@app.command()
def bench(
    model: Annotated[str | None, typer.Argument(help="a Hugging Face directory, an effllm checkpoint directory, or the word demo; none with --kernels")] = None,
    recipe: Annotated[list[str] | None, typer.Option("--recipe", help="a recipe, or several (default w8, w4, w4a8; none for a checkpoint)")] = None,
    baseline: Annotated[list[str] | None, typer.Option("--baseline", help="a baseline, or none; may be given several times (default all four)")] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", min=1, help="interleaved rounds (default 3)")] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", min=1, help="decoded tokens per round (default 64)")] = None,
    prefill: Annotated[int | None, typer.Option("--prefill", min=1, help="prefill tokens (default 512)")] = None,
    context: Annotated[int | None, typer.Option("--context", min=1, help="tokens in the cache before decoding is timed (default 32)")] = None,
    eager_prefill: Annotated[bool, typer.Option("--eager-prefill", help="do not compile the prefill graph: half the compile time")] = False,
    text: Text = None,
    windows: Windows = None,
    calibrate: Calibrate = None,
    bits: cli_kernels.Widths = None,
    reference: Reference = None,
    threads: Threads = None,
    device: Device = "cpu",
    json: Json = None,
    png: Png = None,
    profile: Annotated[bool, typer.Option("--profile", help="instead: where the time of a decoding step goes")] = False,
    kernels: cli_kernels.Kernels = False,
    model_shapes: cli_kernels.Shapes = None,
    rows: cli_kernels.Rows = None,
    op: cli_kernels.Ops = None,
    peers: cli_kernels.Peers = None,
    group: cli_kernels.Group = None,
    seconds: cli_kernels.Seconds = None,
    resume: cli_kernels.Resume = None,
    serve_trace: cli_serve.Trace = None,
    budget: cli_serve.Budget = None,
    sequences: cli_serve.Most = None,
    slowdown: cli_serve.Slowdown = None,
) -> None:
    """Decode and prefill speed of several recipes and baselines, interleaved in one run. A checkpoint runs as it is.

    With --kernels: kernels on layer shapes of real models, verified, then timed in turns with those of peers. With --serve-trace: the time
    between tokens of running sequences while prompts arrive, read in chunks and whole. With --profile: the parts of a decoding step.
    """
    console.writable(json, png)
    serve = {"--serve-trace": serve_trace, "--budget": budget, "--sequences": sequences, "--slowdown": slowdown}
    own = {
        "--model-shapes": model_shapes, "--bits": bits, "--rows": rows, "--op": op, "--peers": peers, "--group": group, "--seconds": seconds,
        "--resume": resume,
    }  # fmt: skip
    other: dict[str, Any] = {
        "--baseline": baseline, "--rounds": rounds, "--tokens": tokens, "--prefill": prefill, "--eager-prefill": eager_prefill, "--text": text,
        "--windows": windows, "--calibrate": calibrate, "--reference": reference,
    }  # fmt: skip
    if serve_trace is not None:
        timed: dict[str, Any] = {"--kernels": kernels, "--context": context, "--png": png}
        cli_serve.run(serve, other | own | timed, model, recipe, threads, device, json)
        return
    cli_serve.only_with_trace(serve)
    if kernels:
        cli_kernels.run(own, {"MODEL": model, "--recipe": recipe, "--context": context} | other, threads, device, json, png)
        return
    width = cli_kernels.only_with_kernels(own, bits)
    if model is None:
        raise OptionError("E-OPT-VALUE", "Missing argument 'MODEL'", "name a model, or add --kernels; see `effllm bench --help`")
    counts = (rounds or 3, tokens or 64, prefill or 512)
    if profile:
        for flag, value in other.items():
            if value and flag != "--tokens":
                raise OptionError("E-OPT-PROFILE", f"{flag} does not apply to --profile", f"leave {flag} out, or --profile")
        found = commands.profile(model, recipe, tokens or 32, threads, context, width)
        for one in found["profiles"]:
            console.out().print(console.profile_table(one))
        console.write_json(found, json)
        return
    result = commands.bench(model, recipe, baseline, *counts, not eager_prefill, text, windows, calibrate, threads, device, width, reference, context)
    console.out().print(console.bench_table(result))
    if "comparison" in result["settings"]:
        console.out().print(result["settings"]["comparison"], markup=False, highlight=False)
    console.write_json(result, json)
    commands.draw("bench_png", result, png)


@app.command()
def explain(model: Model, recipe: Annotated[str | None, _RECIPE] = None, bits: Bits = None, json: Json = None) -> None:
    """What a recipe would do to each module and graph node, and why, without running a step."""
    console.writable(json)
    result = commands.explain(model, recipe, bits)
    console.out().print(result.pop("text"), markup=False, highlight=False, soft_wrap=True)
    console.write_json(result, json)


@app.command()
def tune(
    model: Model,
    recipe: Annotated[str | None, _RECIPE] = None,
    budget: Annotated[str, typer.Option("--budget", help="how long to measure at most: 120, 120s, 2m")] = "120s",
    prefill: Annotated[int, typer.Option("--prefill", min=1, help="length of the prompt to tune for, beside decoding")] = 512,
    bits: Bits = None,
    threads: Threads = None,
    device: Device = "cpu",
    store: Annotated[Path | None, typer.Option("--store", help="directory of the store (default: in the user's cache directory)")] = None,
    json: Json = None,
) -> None:
    """Find the fastest kernel configurations for MODEL on this machine; every later compilation uses them. Can be cut short and resumed."""
    from effllm import commands_tune

    console.writable(json)
    result = commands_tune.tune(model, recipe, budget, prefill, threads, bits, store, device)
    console.out().print(commands_tune.table(result))
    for note in result["notes"]:
        console.out().print(note, markup=False, highlight=False, soft_wrap=True)
    console.write_json(result, json)


@app.command()
def doctor(
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure the cost model's constants (about ten seconds) and keep them.")] = False,
    threads: Threads = None,
    json: Json = None,
) -> None:
    """What the machine has, which kernels will be used, and why not the others; the constants of the cost model."""
    console.writable(json)
    result = commands.doctor(calibrate, threads)
    console.doctor(result)
    console.write_json(result, json)


@app.command()
def demo(json: Json = Path("demo-report.json"), png: Png = Path("demo-report.png"), threads: Threads = None) -> None:
    """w8, w4, w4a8 and w3 against eager bf16 and the strongest Inductor setting, on a real 135M model."""
    console.writable(json, png)
    result = commands.demo(threads)
    console.out().print(console.bench_table(result))
    console.notes(result)
    console.write_json(result, json)
    commands.draw("bench_png", result, png)


if __name__ == "__main__":
    app()
