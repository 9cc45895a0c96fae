"""transformers' own `generate` through the effllm backend: a CompileConfig that really compiles, and why another one would not.

    model.generate(**inputs, cache_implementation="static", compile_config=compile_config("w8"))
    model.generate(**inputs, past_key_values=cache_for(model, "w8+kv:kivi(bits=4)", tokens=1000), compile_config=compile_config("w8"))

`effllm.generate` (hf/decoding.py) is the package's own loop; this is for what only transformers has, such as beam search.

transformers compiles the decode steps only; the prompt is read by the eager model, so by its dense weights unless it went through
`effllm.compress`. Where its conditions are not met it compiles nothing and logs one line that names no cause: nothing reaches the
backend then, so the backend cannot warn. `why_not_compiled` names the causes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import CompileConfig, DynamicCache, EncoderDecoderCache

from effllm import compat
from effllm.backend import Options
from effllm.errors import RecipeError
from effllm.hf.cache import CompressedCache
from effllm.hf.steady import steady_guards
from effllm.recipe import Recipe

_DEVICES = ("cuda", "xpu", "neuron", "tpu")  # where transformers compiles without being asked twice
_STATIC = ("static", "offloaded_static")


def compile_config(
    recipe: Any = "w8", *, fullgraph: bool = False, dynamic: bool | None = None, steady: bool = False, **options: Any
) -> CompileConfig:  # fmt: skip
    """A CompileConfig for `generate` that names this backend and compiles on every device, CPUs too.

    steady: the model's modules do not change any more, so the compiled steps need not look at them (1.6 of 9.8 ms a token on the demo
    model): a promise, a later `compress` or another weight in place of an old one would not be seen. `recipe` and `options` are the
    backend's (see effllm.backend). Raises RecipeError or OptionError at once, not at the first step.
    """
    given: dict[str, Any] = {"recipe": Recipe.parse(recipe), **options}
    Options.parse(given, None)
    if steady:
        given["guard_filter_fn"] = steady_guards
    # mode=None: the default "reduce-overhead" cannot go along with options
    config = CompileConfig(fullgraph=fullgraph, dynamic=dynamic, backend="effllm", mode=None, options=given)  # type: ignore[arg-type]
    compat.compile_on_every_device(config)
    return config


def cache_for(model: Any, recipe: Any, tokens: int, attention_mask: Tensor | None = None, rows: int = 1) -> CompressedCache:
    """The static cache of a recipe's kv part for `tokens` tokens (prompt and answer), ready for `generate`'s past_key_values.

    `attention_mask` (B, S) is that of a left-padded prompt: padding stays out of packed pages. `rows` are beams or returned sequences a
    prompt. Raises RecipeError (E-RCP-KV) where the recipe has no kv part.
    """
    parsed = Recipe.parse(recipe)
    if parsed.kv is None:
        raise RecipeError("E-RCP-KV", f"recipe {parsed.name!r} has no kv part", "add one, for example +kv:kivi(bits=4)")
    cache = CompressedCache(model, parsed.kv, tokens)
    return cache if attention_mask is None else cache.prepare(model, attention_mask=attention_mask.repeat_interleave(rows, 0))


def why_not_compiled(model: Any, generation_config: Any = None, **kwargs: Any) -> list[str]:
    """Why `model.generate(generation_config=..., **kwargs)` would not compile its decode steps with effllm; empty if it would.

    Takes what `generate` takes; keywords count before `generation_config`, which counts before the model's own.
    """
    sources = [g for g in (generation_config, getattr(model, "generation_config", None)) if g is not None]

    def setting(name: str) -> Any:
        values = [kwargs.get(name), *(getattr(g, name, None) for g in sources)]
        return next((v for v in values if v is not None), None)

    config = setting("compile_config")
    reasons = [] if config is not None else ["no compile_config is given; pass effllm.hf.generation.compile_config(...)"]
    if config is not None and config.backend != "effllm":
        reasons.append(f"the backend of compile_config is {config.backend!r}, not 'effllm'")
    if setting("disable_compile"):
        reasons.append("disable_compile is set")
    device = model.device.type
    if device not in _DEVICES and not (config is not None and compat.compiles_on_every_device(config)):
        reasons.append(f"transformers does not compile on {device} with a plain CompileConfig; use effllm.hf.generation.compile_config(...)")
    reasons += _cache(kwargs.get("past_key_values"), setting("cache_implementation"))
    if (setting("num_beams") or 1) > 1:
        reasons.append("beam search runs in eager mode")
    if kwargs.get("assistant_model") is not None or setting("prompt_lookup_num_tokens"):
        reasons.append("assisted decoding runs in eager mode")
    if setting("max_new_tokens") == 1 and not setting("prefill_chunk_size"):
        reasons.append("one new token comes from the prompt's pass, which runs in eager mode")
    return reasons + _model(model)


def _cache(cache: Any, implementation: str | None) -> list[str]:
    """Why the cache stands in the way."""
    if cache is None:
        return [] if implementation in _STATIC else [f"the cache is {implementation or 'dynamic'}; pass cache_implementation='static'"]
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    if cache.is_compileable and type(own) is not DynamicCache:
        return []
    return [f"past_key_values is a {type(own).__name__}, which does not compile; pass a StaticCache"]


def _model(model: Any) -> list[str]:
    """Why the model itself stands in the way."""
    reasons = []
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:
        reasons.append(f"its quantizer {type(quantizer).__name__} is not compileable")
    devices = {str(d) for d in getattr(model, "hf_device_map", {}).values()}
    if "disk" in devices or ("cpu" in devices and len(devices) > 1):
        reasons.append("a part of the model is offloaded to the CPU or to disk")
    if "llama4" in getattr(model.config, "model_type", ""):
        reasons.append("transformers never compiles llama4 in generate")
    return reasons
