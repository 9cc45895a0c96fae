"""The bench: build and check every variant, time them interleaved, score them on text, and return one JSON-ready result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from effllm.autotune import machine
from effllm.errors import OptionError
from effllm.hf import evaluate, measure, texts, variants
from effllm.hf.background import Packing
from effllm.hf.measure import Times, spread
from effllm.hf.models import chat_ids
from effllm.hf.scoring import for_scoring
from effllm.hf.size import weight_size
from effllm.hf.variants import Shape, Variant

PROMPT = "Explain in a few sentences why the sky is blue."
PEAK = "of the process in the variant's own turns, less the weights that only other variants hold; copies inside compiled graphs (freezing) stay in"
NO_PEAK = "not measured: this system does not reset the peak of the resident set (/proc/self/clear_refs)"
Progress = Callable[[str, float], None]  # what is done now, and the share of the whole that is behind


@dataclass
class Plan:
    """What to compare, and how long. `calibration` windows go to recipes named in `calibrated`; `windows` are scored.

    `packed` are models that are packed already, by the name of their recipe; they run as they are. A `Packing` is waited for.
    """

    recipes: Sequence[str]
    baselines: Sequence[str] = variants.BASELINES
    shape: Shape = field(default_factory=Shape)
    rounds: int = 3
    windows: Tensor | None = None
    calibration: Tensor | None = None
    calibrated: Sequence[str] = ()
    compile_prefill: bool = True
    sample_tokens: int = 48
    packed: Mapping[str, Any] = field(default_factory=dict)


def _silent(what: str, share: float) -> None:
    del what, share


def run(dense: Any, tokenizer: Any, plan: Plan, progress: Progress = _silent) -> dict[str, Any]:
    """{"machine": ..., "rows": [...]} as in the design; extra keys hold spreads and settings.

    `dense` may be None where the plan has only packed models; then there is no figure that compares to it (kl, top1_agreement).
    Raises OptionError for unknown baselines and where a dense model is needed, RecipeError for unknown recipes, before anything
    is built.
    """
    variants.check_baselines(list(plan.baselines))
    for what in plan.recipes:
        variants.Recipe.parse(what)
    if dense is None and (plan.recipes or plan.baselines or not plan.packed):
        raise OptionError("E-OPT-DENSE", "recipes and baselines start from dense weights, and there are none", "give a dense model")
    ids = _prompt_ids(next(iter(plan.packed.values())) if dense is None else dense, tokenizer, plan.shape)
    # shares of the whole, from measured runs: building takes most of the time
    count = len(plan.recipes) + len(plan.baselines) + len(plan.packed)
    built: list[Variant] = []
    errors: dict[str, float] = {}
    waiting = [n for n, m in plan.packed.items() if isinstance(m, Packing)]  # last: they get ready meanwhile
    for i, name in enumerate([*plan.baselines, *(n for n in plan.packed if n not in waiting), *plan.recipes, *waiting]):
        progress(f"building {name}", 0.7 * i / count)
        variant = _build(name, dense, plan)
        errors[variant.name] = measure.check(variant, ids, plan.shape)
        built.append(variant)
    progress("measuring bandwidth", 0.7)
    roof = machine.measure_bandwidth(device=ids.device.type)
    load = machine.OtherLoad()
    turns = iter(range(plan.rounds * count))
    times = measure.measure(built, ids, plan.shape, plan.rounds, lambda: progress("timing", 0.7 + 0.1 * next(turns) / (plan.rounds * count)))
    others = load.cores()
    quality, scored_as = _quality(built, dense, plan, progress)
    progress("generating", 0.98)
    rows = [_row(v, times[v.name], errors[v.name], quality.get(v.name, {}), roof, tokenizer, plan) for v in built]
    for v, row in zip(built, rows, strict=True):
        row["peak_rss_bytes"] = _own_peak(times[v.name], v.model, [dense, *(b.model for b in built)])
    about = machine.describe() | {"read_bandwidth_gb_s": roof, "other_cores_busy": others}
    progress("done", 1.0)
    settings = _settings(plan) | {"peak_rss": PEAK if all(r["peak_rss_bytes"] is not None for r in rows) else NO_PEAK}
    settings |= {"scored": scored_as} if scored_as else {}
    return {"machine": about, "rows": rows, "settings": settings}


def _build(name: str, dense: Any, plan: Plan) -> Variant:
    if name in variants.BASELINES:
        return variants.baseline(name, dense, plan.shape, compile_prefill=plan.compile_prefill)
    if name in plan.packed:
        ready = plan.packed[name]
        waited = isinstance(ready, Packing)
        made = variants.packed(name, ready.model() if waited else ready, plan.shape, compile_prefill=plan.compile_prefill)
        made.notes = ["calibrated"] if waited else ["packed before"]
        return made
    calibration = plan.calibration if name in plan.calibrated else None
    return variants.recipe(name, dense, plan.shape, calibration, compile_prefill=plan.compile_prefill)


def _quality(built: list[Variant], dense: Any, plan: Plan, progress: Progress) -> tuple[dict[str, dict[str, float]], str | None]:
    """Figures by variant, and what was scored where it was not the models themselves."""
    if plan.windows is None:
        return {}, None
    # baselines hold the dense weights, in whatever dtype: they share its figures
    windows = plan.windows
    distinct = {v.name: v.model for v in built if v.recipe is not None}
    steps = iter(range(len(windows)))
    shared = {} if dense is None else {"": dense}
    models, why = for_scoring({**shared, **distinct})
    found = evaluate.score(models, models.get(""), windows, lambda: progress("scoring text", 0.8 + 0.18 * next(steps) / len(windows)))
    return {v.name: found[v.name if v.name in distinct else ""] for v in built}, why


def _row(v: Variant, times: Times, error: float, quality: dict[str, float], roof: float, tokenizer: Any, plan: Plan) -> dict[str, Any]:
    decode, prefill, size = spread(times.decode), spread(times.prefill), weight_size(v.model)
    tokens = plan.shape.tokens
    achieved = size.read * tokens / decode.median / 1e9
    return {
        "variant": v.name,
        "recipe": v.recipe,
        "decode_tok_s": tokens / decode.median,
        "decode_tok_s_range": [tokens / decode.high, tokens / decode.low],
        "decode_ms_per_token": 1e3 * decode.median / tokens,
        "prefill_tok_s": plan.shape.prefill / prefill.median,
        "prefill_tok_s_range": [plan.shape.prefill / prefill.high, plan.shape.prefill / prefill.low],
        "ttft_s": prefill.median,
        "weight_bytes": size.read,
        "kv_bytes": v.runner.cache_bytes,
        "kv_bytes_per_token": v.runner.cache_bytes / v.runner.length,
        "held_bytes": size.held,
        "bits_per_weight": size.bits_per_weight,
        "achieved_gb_s": achieved,
        "share_of_bandwidth": achieved / roof,
        "perplexity": quality.get("perplexity"),
        "kl": quality.get("kl"),
        "top1_agreement": quality.get("top1_agreement"),
        "checked_error": error,
        "notes": v.notes,
        "sample": sample(v, tokenizer, plan.sample_tokens),
    }


def _own_peak(times: Times, model: Any, everybody: Sequence[Any]) -> int | None:
    """Peak of the variant's own turns, less the weights in host memory that only the dense model and other variants hold."""
    if times.peak is None:
        return None
    others = {id(m): m for m in everybody if m is not None and m is not model}.values()
    host = [m for m in others if all(t.device.type == "cpu" for t in (*m.parameters(), *m.buffers()))]
    return times.peak - sum(weight_size(m).held for m in host)


def sample(v: Variant, tokenizer: Any, limit: int, prompt: str = PROMPT) -> str:
    """What the variant answers to a chat prompt, greedily, cut after its last whole sentence; empty without a tokenizer."""
    if tokenizer is None:
        return ""
    ids = chat_ids(tokenizer, prompt)[:, -(v.runner.length - 1) :].to(v.runner.device)
    count = max(1, min(limit, v.runner.length - ids.shape[1]))
    tokens, _ = v.runner.decode(v.runner.start(ids), ids.shape[1], count)
    stop = next((i for i, t in enumerate(tokens) if t == tokenizer.eos_token_id), None)
    text = " ".join(str(tokenizer.decode(tokens[:stop], skip_special_tokens=True)).split())
    end = max(text.rfind(c) for c in ".!?") + 1
    return text[:end] if end else text


def _prompt_ids(model: Any, tokenizer: Any, shape: Shape) -> Tensor:
    """Ids (1, n) for timing: real text where the model can read it, since random ids would take the same time but say nothing in the check."""
    need = max(shape.prefill, shape.prompt)
    if tokenizer is not None:
        ids = texts.windows(tokenizer, texts.evaluation_text().text, need, 1)
    else:
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        ids = torch.randint(0, vocabulary, (1, need), generator=torch.Generator().manual_seed(0))
    return ids.to(next(t.device for t in (*model.parameters(), *model.buffers())))


def _settings(plan: Plan) -> dict[str, Any]:
    s = plan.shape
    return {
        "decode": f"{s.tokens} greedy tokens after a {s.prompt}-token prompt, batch 1, static cache of {s.length}",
        "prefill": f"{s.prefill} tokens, last logits only, {'compiled' if plan.compile_prefill else 'eager'}",
        "ttft": f"the {s.prefill}-token prefill until its first token is chosen",
        "rounds": plan.rounds,
        "windows": 0 if plan.windows is None else len(plan.windows),
    }
