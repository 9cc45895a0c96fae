"""What each command does, from plain arguments to a JSON-ready result. Torch and transformers are imported on use."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effllm import console
from effllm.errors import OptionError, nearest
from effllm.recipe import Recipe

CALIBRATION_WINDOWS = 24
SCORED = 17  # windows: 8,704 tokens


def compress(model: str, out: Path, recipe: str, calibrate: Path | None, strict: bool) -> dict[str, Any]:
    """Pack and save; the report's dict, plus its printed form under "text"."""
    parsed = Recipe.parse(recipe)
    from effllm.compression import compress as run
    from effllm.hf import models
    from effllm.runtime.checkpoint import save

    with console.progress("compress") as show:
        show("loading", 0.0)
        dense, tokenizer = models.resolve(model)
        windows = _calibration(calibrate, tokenizer, model)
        _refuse_packed(model, "compress packs dense weights")
        report = run(
            dense, parsed, calibration=windows, strict=strict, progress=lambda done, total, name: show("packing", 0.1 + 0.8 * done / max(1, total))
        )
        show("saving", 0.9)
        save(dense, out)
        if tokenizer is not None:
            tokenizer.save_pretrained(out)
        show("done", 1.0)
    return report.to_dict() | {"text": str(report), "out": str(out)}


def evaluate(
    model: str, recipe: str, text: Path | None, calibrate: Path | None, prompt_tokens: int, windows: int | None, threads: int | None
) -> dict[str, Any]:
    """perplexity, kl, top1_agreement, tokens, weight_bytes; and the dense model's perplexity beside them.

    Recipes without a kv part are scored in windows of 512; `prompt_tokens` is for those with one.
    """
    del prompt_tokens  # no recipe of this version has a kv part: Recipe.parse refuses them
    parsed = Recipe.parse(recipe)
    import copy

    from effllm.compression import compress as run
    from effllm.hf import models, size
    from effllm.hf.evaluate import score

    _threads(threads)
    with console.progress("eval") as show:
        show("loading", 0.0)
        dense, tokenizer = models.resolve(model)
        _refuse_packed(model, "eval compares to a dense model")
        scored = _windows(text, tokenizer, model, windows)
        show("packing", 0.1)
        packed = copy.deepcopy(dense)
        run(packed, parsed, calibration=_calibration(calibrate, tokenizer, model))
        steps = iter(range(len(scored)))
        found = score({"dense": dense, "packed": packed}, dense, scored, lambda: show("scoring", 0.3 + 0.7 * (next(steps) + 1) / len(scored)))
    figures: dict[str, Any] = dict(found["packed"])
    return figures | {
        "weight_bytes": size.weight_size(packed).read,
        "dense_weight_bytes": size.weight_size(dense).read,
        "dense_perplexity": found["dense"]["perplexity"],
        "perplexity_ratio": figures["perplexity"] / found["dense"]["perplexity"],
        "recipe": parsed.name,
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
) -> dict[str, Any]:
    """The result of `hf.bench.run`."""
    from effllm.hf import bench as harness
    from effllm.hf import models, variants

    wanted = list(recipes or ("w8", "w4", "w4a8"))
    names = [b for b in (variants.BASELINES if baselines is None else baselines) if b != "none"]
    variants.check_baselines(names)
    for what in wanted:
        Recipe.parse(what)
    _threads(threads)
    _refuse_packed(model, "bench packs a dense model itself")
    with console.progress("bench") as show:
        show("loading", 0.0)
        dense, tokenizer = models.resolve(model)
        dense.to(_device(device))
        scored = _windows(text, tokenizer, model, windows or SCORED) if text is not None or model == "demo" else None
        calibration = _calibration(calibrate, tokenizer, model)
        plan = harness.Plan(
            recipes=wanted,
            baselines=names,
            shape=variants.Shape(tokens=tokens, prefill=prefill),
            rounds=rounds,
            windows=scored,
            calibration=calibration,
            calibrated=wanted if calibration is not None else (),
            compile_prefill=compile_prefill,
        )
        return harness.run(dense, tokenizer, plan, show)


def explain(model: str, recipe: str) -> dict[str, Any]:
    """The backend's report on one decode step's graph, its printed form under "text", and the recipe's preview."""
    parsed = Recipe.parse(recipe)
    import torch

    from effllm.backend import explain as run
    from effllm.hf import models

    dense, _ = models.resolve(model)
    report = run(dense, {"input_ids": torch.zeros(1, 1, dtype=torch.long), "use_cache": False}, parsed)
    return report.to_dict() | {"text": str(report), "preview": parsed.preview(dense)}


def doctor() -> dict[str, Any]:
    """The findings of `effllm.doctor`."""
    from effllm.doctor import examine

    return examine()


def demo(threads: int | None) -> dict[str, Any]:
    """The bench of `make demo`: eager prefill, data-free solvers; "settings" says so, and how long it all took."""
    from effllm.hf import bench as harness
    from effllm.hf import models, texts

    start = time.monotonic()
    _threads(threads)
    with console.progress("demo") as show:
        show("loading", 0.0)
        dense, tokenizer = models.resolve("demo")
        corpus = texts.evaluation_text()
        plan = harness.Plan(
            recipes=("w8", "w4", "w4a8", "w3"),
            baselines=("eager-bf16", "inductor-bf16-freezing", "inductor-fp32-autotune"),
            windows=texts.windows(tokenizer, corpus.text, 512, SCORED),
            compile_prefill=False,
        )
        result = harness.run(dense, tokenizer, plan, show)
    result["settings"] |= {
        "text": f"{corpus.name} ({corpus.licence}), {SCORED} windows of 512 tokens",
        "solver": "data-free; calibration lowers the perplexity of w3 most, and takes minutes (effllm compress --calibrate)",
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


def _windows(text: Path | None, tokenizer: Any, model: str, count: int | None) -> Any:
    from effllm.hf import models, texts

    if text is None and model != "demo":
        raise OptionError("E-OPT-TEXT", "no text to score", "give --text FILE")
    words = texts.evaluation_text().text if text is None else _read(text)
    # the built-in text has 600k tokens: score a fixed head of it unless asked for more
    return texts.windows(models.need_tokenizer(tokenizer, model), words, 512, count or (SCORED if text is None else None))


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


def _refuse_packed(model: str, why: str) -> None:
    from effllm.hf import models

    if model != "demo" and models.is_checkpoint(Path(model)):
        raise OptionError("E-OPT-MODEL", f"{model!r} is packed already, and {why}", "give the dense model's directory")


def _device(name: str) -> str:
    import torch

    if name not in ("cpu", "cuda"):
        raise OptionError("E-OPT-DEVICE", f"unknown device {name!r}", nearest(name, ("cpu", "cuda")))
    if name == "cuda" and not torch.cuda.is_available():
        raise OptionError("E-OPT-DEVICE", "torch sees no GPU here", "use --device cpu")
    return name


def _threads(count: int | None) -> None:
    if count is not None:
        import torch

        torch.set_num_threads(count)
