"""What `effllm bench --serve-trace` does: one model, one trace, served with chunks that fit a budget and with whole prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from effllm import console
from effllm.errors import OptionError
from effllm.recipe import Recipe
from effllm.runtime.trace import read


def serve(model: str, trace: Path, recipe: str | None, budget: int | None, most: int, slowdown: float, threads: int | None, device: str) -> dict[str, Any]:
    """{"machine", "rows", "settings"}: a row per policy, "chunked" (the budget) and "whole prompts" (a budget that holds any prompt).

    Prompts are random ids of the trace's lengths and no sequence ends early, so that every run computes the same. Raises OptionError
    (E-OPT-TRACE where a request does not fit the model, E-OPT-BUDGET, E-OPT-MODEL) before the first forward.
    """
    arrivals = read(trace)
    parsed = None if recipe is None else Recipe.parse(recipe)
    if budget is not None and budget < most:
        raise OptionError("E-OPT-BUDGET", f"--budget {budget} for --sequences {most}", "give at least a token per sequence")
    import torch

    from effllm.autotune import machine
    from effllm.commands import device_of, use_threads
    from effllm.compression import compress
    from effllm.hf import models, subject
    from effllm.hf.engine import limit, vocabulary
    from effllm.hf.replay import choose_budget, replay, summary
    from effllm.hf.serving import Loop

    if parsed is not None:
        subject.refuse_packed(model)
    use_threads(threads)
    with console.progress("serve") as show:
        show("loading", 0.0)
        loaded, _ = models.resolve(model)
        if parsed is not None:
            show("packing", 0.05)
            compress(loaded, parsed)
        loaded.to(device_of(device))
        most_tokens = limit(loaded.config.get_text_config(decoder=True))
        for a in arrivals:
            if a.prompt + a.new - 1 > most_tokens:
                cause = f"{trace}: a request of {a.prompt} + {a.new} tokens, and the model's positions end at {most_tokens}"
                raise OptionError("E-OPT-TRACE", cause, "write a trace with a smaller --longest")
        longest = max(a.prompt for a in arrivals)
        if budget is None:
            show("measuring the budget", 0.1)
            budget = choose_budget(loaded, most, sorted(a.prompt for a in arrivals)[len(arrivals) // 2], longest, slowdown)
        slots = most * max(a.prompt + a.new for a in arrivals)
        words = vocabulary(loaded) or 1

        def ids(n: int) -> torch.Tensor:
            return torch.randint(0, words, (n,), generator=torch.Generator().manual_seed(n))

        rows, policies = [], {"chunked": budget, "whole prompts": most + longest * most}
        load = machine.OtherLoad()
        for i, (name, tokens) in enumerate(policies.items()):
            loop = Loop(loaded, budget=tokens, most=most, slots=slots, eos_token_id=[])

            def tell(share: float, i: int = i, name: str = name) -> None:
                show(f"serving, {name}", 0.2 + 0.8 * (i + share) / len(policies))

            log = replay(loop, arrivals, ids, progress=tell)
            rows.append({"policy": name, "budget": tokens, "recipe": recipe} | summary(log))
        show("done", 1.0)
    settings = {
        "model": model, "trace": str(trace), "sequences": most, "slots": slots, "slowdown": slowdown, "longest_prompt": longest,
        "how": "eager forwards, random prompt ids, greedy, no early end; waits for arrivals are skipped",
    }  # fmt: skip
    return {"machine": machine.describe() | {"other_cores_busy": load.cores()}, "rows": rows, "settings": settings}


def table(result: dict[str, Any]) -> Any:
    """Rows of a result for the terminal, milliseconds."""

    def ms(part: dict[str, float | None], names: tuple[str, ...]) -> str:
        return " / ".join("-" if part[n] is None else f"{1e3 * part[n]:.0f}" for n in names)  # type: ignore[operator]

    cells = [
        [
            r["policy"], str(r["budget"]), f"{r['new_tok_s']:.1f}", ms(r["time_between_tokens_s"], ("p50", "p90", "p99", "max")),
            ms(r["time_to_first_token_s"], ("p50", "p99")), ms(r["decode_step_s"], ("p50", "p99")), ms(r["mixed_step_s"], ("p50", "p99")),
        ]
        for r in result["rows"]
    ]  # fmt: skip
    heads = ["policy", "budget", "new tok/s", "between tokens p50/p90/p99/max", "first token p50/p99", "decode step p50/p99", "mixed step p50/p99"]
    return console.table(f"{result['settings']['model']}, {result['settings']['trace']}, milliseconds", heads, cells)
