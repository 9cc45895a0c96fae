"""What each command does, from plain arguments to a JSON-ready result. Torch and transformers are imported on use."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effllm import console
from effllm.errors import OptionError, nearest
from effllm.recipe import Recipe

CALIBRATION_WINDOWS = 24
DEFAULT = "w8"
SCORED = 16  # windows: 8,192 tokens
DEMO_CALIBRATION = 8  # windows: more would take longer than all the rest of the demo


def compress(model: str, out: Path, recipe: str, calibrate: Path | None, strict: bool) -> dict[str, Any]:
    """Pack and save; the report's dict, plus its printed form under "text"."""
    parsed = Recipe.parse(recipe)
    from effllm.compression import compress as run
    from effllm.hf import models, subject
    from effllm.runtime.checkpoint import save

    subject.refuse_packed(model)
    with console.progress("compress") as show:
        show("loading", 0.0)
        dense, tokenizer = models.resolve(model)
        windows = _calibration(calibrate, tokenizer, model)
        report = run(
            dense, parsed, calibration=windows, strict=strict, progress=lambda done, total, name: show("packing", 0.1 + 0.8 * done / max(1, total))
        )
        show("saving", 0.9)
        save(dense, out, tokenizer=tokenizer)
        show("done", 1.0)
    return report.to_dict() | {"text": str(report), "out": str(out)}


def evaluate(
    model: str,
    recipe: str | None,
    text: Path | None,
    calibrate: Path | None,
    prompt_tokens: int,
    windows: int | None,
    threads: int | None,
    bits: int | None = None,
    reference: str | None = None,
) -> dict[str, Any]:
    """perplexity, kl, top1_agreement, tokens, weight_bytes; and the dense model's perplexity beside them.

    A checkpoint is scored as it is, or at `bits`; without `reference`, its dense model, kl and top1_agreement are None and
    "comparison" says so. Recipes without a kv part are scored in windows of 512; with one the 512 tokens behind a compressed prompt of
    `prompt_tokens` are scored.
    """
    parsed = Recipe.parse(recipe or DEFAULT)
    import copy

    from effllm.compression import compress as run
    from effllm.hf import models, size, subject
    from effllm.hf.evaluate import score
    from effllm.hf.scoring import for_scoring

    given = models.is_packed(model)
    if given and recipe is not None:
        step = "leave --recipe out; --bits reads it at fewer bits"
        raise OptionError("E-OPT-PACKED", f"{model!r} is packed already, so --recipe {recipe} does not apply", step)
    subject.check_options(model, reference, calibrate=calibrate)
    if given and calibrate is not None:
        raise OptionError("E-OPT-PACKED", f"{model!r} is packed already, so --calibrate does not apply", "leave --calibrate out")
    use_threads(threads)
    with console.progress("eval") as show:
        show("loading", 0.0)
        if given:
            loaded = subject.load(model, bits, reference)
            packed, dense, tokenizer, name = loaded.model, loaded.reference, loaded.tokenizer, loaded.recipe
            scored = _windows(text, tokenizer, model, windows)
            parsed = Recipe.parse("dense")
        else:
            dense, tokenizer = models.resolve(model, bits=bits)
            name = parsed.name
            scored = _windows(text, tokenizer, model, windows, prompt_tokens if parsed.kv else 0)
            show("packing", 0.1)
            packed = copy.deepcopy(dense)
            run(packed, parsed, calibration=_calibration(calibrate, tokenizer, model))
        steps = iter(range(len(scored)))
        both, scored_as = {"packed": packed} | ({} if dense is None else {"dense": dense}), None
        if parsed.kv is None:  # a cache stores scales and recent tokens in the model's dtype, which is part of what is scored
            both, scored_as = for_scoring(both)
        prompt = prompt_tokens if parsed.kv else 0
        found = score(both, both.get("dense"), scored, lambda: show("scoring", 0.3 + 0.7 * (next(steps) + 1) / len(scored)), parsed.kv, prompt)
    figures: dict[str, Any] = {"perplexity": None, "kl": None, "top1_agreement": None, "tokens": None} | found["packed"]
    figures |= {"weight_bytes": size.weight_size(packed).read, "recipe": name}
    figures |= {} if parsed.kv is None else {"kv": parsed.kv, "prompt_tokens": prompt_tokens}
    figures |= {} if scored_as is None else {"scored": scored_as}
    if dense is None:
        return figures | {"comparison": subject.ALONE}
    return figures | {
        "dense_weight_bytes": size.weight_size(dense).read,
        "dense_perplexity": found["dense"]["perplexity"],
        "perplexity_ratio": figures["perplexity"] / found["dense"]["perplexity"],
    }


def bench(
    model: str,
    recipes: Sequence[str] | None,
    baselines: Sequence[str] | None,
    rounds: int,
    tokens: int,
    prefill: int,
    compile_prefill: bool,
    text: Path | None,
    windows: int | None,
    calibrate: Path | None,
    threads: int | None,
    device: str,
    bits: int | None = None,
    reference: str | None = None,
    context: int | None = None,
) -> dict[str, Any]:
    """The result of `hf.bench.run`, decoding behind a prompt of `context` tokens (default 32).

    A checkpoint runs as it is, or at `bits`; recipes and baselines beside it need `reference`.
    """
    from effllm.hf import bench as harness
    from effllm.hf import models, subject, variants

    given = models.is_packed(model)
    named = [b for b in baselines or () if b != "none"]
    variants.check_baselines(named)
    wanted = list(recipes or (() if given else ("w8", "w4", "w4a8")))
    for what in wanted:
        Recipe.parse(what)
    subject.check_options(model, reference, recipes, named, calibrate)
    alone = given and reference is None
    if given and calibrate is not None and not wanted:
        raise OptionError("E-OPT-PACKED", f"{model!r} is packed already, so --calibrate does not apply", "leave --calibrate out, or add --recipe")
    use_threads(threads)
    with console.progress("bench") as show:
        show("loading", 0.0)
        packed = {}
        if given:
            loaded = subject.load(model, bits, reference)
            dense, tokenizer = loaded.reference, loaded.tokenizer
            name = loaded.recipe if loaded.recipe not in wanted else f"{loaded.recipe} (checkpoint)"
            packed[name] = loaded.model.to(device_of(device))
        else:
            dense, tokenizer = models.resolve(model, bits=bits)
        if dense is not None:
            dense.to(device_of(device))
        scored = _windows(text, tokenizer, model, windows or SCORED) if text is not None or model == "demo" else None
        calibration = _calibration(calibrate, tokenizer, model)
        plan = harness.Plan(
            recipes=wanted,
            baselines=named if baselines is not None or alone else list(variants.BASELINES),
            shape=variants.Shape(prompt=context or variants.Shape.prompt, tokens=tokens, prefill=prefill),
            rounds=rounds,
            windows=scored,
            calibration=calibration,
            calibrated=wanted if calibration is not None else (),
            compile_prefill=compile_prefill,
            packed=packed,
        )
        result = harness.run(dense, tokenizer, plan, show)
    if alone:
        result["settings"]["comparison"] = "no dense model to compare to: give --reference MODEL for baselines, KL and top-1 agreement"
    return result


def profile(model: str, recipes: Sequence[str] | None, tokens: int, threads: int | None, context: int | None, bits: int | None = None) -> dict[str, Any]:
    """Where the time of a decoding step goes, per recipe: {"machine", "profiles"}; a checkpoint runs as it is, or at `bits`."""
    import torch

    from effllm.autotune.machine import describe
    from effllm.hf import models, profile, subject, variants

    shape = variants.Shape(prompt=context or variants.Shape.prompt, tokens=tokens)
    wanted = list(recipes or ("w8", "w4", "w4a8"))
    use_threads(threads)
    found = []
    with console.progress("profile") as show:
        show("loading", 0.0)
        if models.is_packed(model):
            loaded = subject.load(model, bits, None)
            made, tokenizer = [lambda: variants.packed(loaded.recipe, loaded.model, shape, compile_prefill=False)], loaded.tokenizer
        else:
            dense, tokenizer = models.resolve(model, bits=bits)
            made = [lambda what=what: variants.recipe(what, dense, shape, compile_prefill=False) for what in wanted]  # type: ignore[misc]
        del tokenizer
        for i, make in enumerate(made):
            show(wanted[i], i / len(made))
            variant = make()
            ids = torch.randint(3, variant.model.config.get_text_config().vocab_size, (1, shape.prompt), generator=torch.Generator().manual_seed(0))
            found.append(profile.profile(variant, ids, tokens))
    return {"machine": describe(), "profiles": found}


def explain(model: str, recipe: str | None, bits: int | None = None) -> dict[str, Any]:
    """The backend's report on one decode step's graph, its printed form under "text", and the recipe's preview.

    For a checkpoint the report opens with a Decision per packed module; the recipe is for what the checkpoint left dense.
    """
    parsed = Recipe.parse(recipe or DEFAULT)
    import torch

    from effllm.backend import explain as run
    from effllm.hf import models
    from effllm.runtime import recorded

    given, _ = models.resolve(model, bits=bits)
    report = run(given, {"input_ids": torch.zeros(1, 1, dtype=torch.long), "use_cache": False}, parsed)
    if models.is_packed(model):
        report.passes.insert(0, recorded.decisions(given))
        report.notes.append(f"the checkpoint was packed with {recorded.recipe_of(given)}; {parsed.name} is for what it left dense")
    return report.to_dict() | {"text": str(report), "preview": parsed.preview(given)}


def doctor(calibrate: bool = False, threads: int | None = None) -> dict[str, Any]:
    """The findings of `effllm.doctor`, after measuring the cost model's constants if asked."""
    from effllm.doctor import examine

    use_threads(threads)
    if calibrate:
        from effllm.autotune import calibrate as calibration
        from effllm.autotune import machines, use

        with console.progress("calibrate") as show:
            show("measuring", 0.0)
            machines.keep(calibration.measure())
            use.forget()  # choices so far were made with other constants
    return examine()


def demo(threads: int | None) -> dict[str, Any]:
    """The bench of `make demo`: eager prefill, w3 calibrated on a short text; "settings" says so, and how long it all took."""
    from effllm.hf import bench as harness
    from effllm.hf import models, texts, variants
    from effllm.hf.background import Packing

    start = time.monotonic()
    use_threads(threads)
    packing = Packing("w3", DEMO_CALIBRATION)
    with contextlib.closing(packing), console.progress("demo") as show:
        show("loading", 0.0)
        dense, tokenizer = models.resolve("demo")
        corpus = texts.evaluation_text()
        plan = harness.Plan(
            recipes=("w8", "w4", "w4a8"),
            baselines=("eager-bf16", "inductor-bf16-freezing", "inductor-fp32-autotune"),
            windows=texts.windows(tokenizer, corpus.text, 512, SCORED),
            shape=variants.Shape(tokens=40),
            sample_tokens=40,
            packed={"w3": packing},
            compile_prefill=False,
        )
        result = harness.run(dense, tokenizer, plan, show)
    result["settings"] |= {
        "text": f"{corpus.name} ({corpus.licence}), {SCORED} windows of 512 tokens",
        "solver": f"data-free, but w3: calibrated on {DEMO_CALIBRATION} windows of 512 tokens of other articles",
        "seconds": time.monotonic() - start,
    }
    return result


def draw(what: str, result: dict[str, Any], path: Path | None) -> None:
    """Draw a result with a function of `hf.plot`; OptionError (E-OPT-WRITE) where the file cannot be written."""
    if path is None:
        return
    from effllm.hf import plot

    if path.suffix != ".png":
        raise OptionError("E-OPT-WRITE", f"{path} does not end in .png", "give a file name that ends in .png")
    try:
        getattr(plot, what)(result, path)
    except OSError as error:
        raise OptionError("E-OPT-WRITE", f"cannot write {path}: {error}", "give a path in a folder that exists and is writable") from error


def _windows(text: Path | None, tokenizer: Any, model: str, count: int | None, prompt: int = 0) -> Any:
    from effllm.hf import models, texts

    if text is None and model != "demo":
        raise OptionError("E-OPT-TEXT", "no text to score", "give --text FILE")
    words = texts.evaluation_text().text if text is None else _read(text)
    # the built-in text has 600k tokens: score a fixed head of it unless asked for more
    return texts.windows(models.need_tokenizer(tokenizer, model), words, prompt + 512, count or (SCORED if text is None else None))


def _calibration(path: Path | None, tokenizer: Any, model: str) -> Any:
    if path is None:
        return None
    from effllm.hf import models, texts

    windows = texts.windows(models.need_tokenizer(tokenizer, model), _read(path), 512)
    return windows[:CALIBRATION_WINDOWS]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError("E-OPT-TEXT", f"cannot read {path}: {error}", "give an existing UTF-8 text file") from error


def device_of(name: str) -> str:
    """The name, checked. Raises OptionError (E-OPT-DEVICE)."""
    import torch

    if name not in ("cpu", "cuda"):
        raise OptionError("E-OPT-DEVICE", f"unknown device {name!r}", nearest(name, ("cpu", "cuda")))
    if name == "cuda" and not torch.cuda.is_available():
        raise OptionError("E-OPT-DEVICE", "torch sees no GPU here", "use --device cpu")
    return name


def use_threads(count: int | None) -> None:
    """Set torch's number of threads; None leaves it."""
    if count is not None:
        import torch

        torch.set_num_threads(count)
