"""Proves what positions do in a transformers model, and follows frequencies that depend on the length."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from effllm import compat
from effllm.errors import EditError
from effllm.passes import rope
from effllm.passes.base import Context
from effllm.passes.rope_flow import Refused
from effllm.recipe import Recipe
from effllm.report import PassReport
from effllm.runtime.rotary import Rotary

TOKENS = 37  # of the traced text: no usual number of heads
_STEP = "recompute the text instead, or use a model with plain rotary positions in every layer"
_proved: weakref.WeakKeyDictionary[nn.Module, Positions] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Positions:
    """The rotation of a model's keys, `turning` which layers have it, and the report of the proof."""

    rotary: Rotary
    turning: tuple[bool, ...]
    report: PassReport


def positions_of(model: nn.Module) -> Positions:
    """The proof for a causal language model, kept for the next call. Traces the model once, which takes seconds.

    Raises EditError: E-EDT-WINDOW (layers with a sliding window), E-EDT-ROPE (with the reason why it is not proved).
    """
    if model in _proved:
        return _proved[model]
    refuse_windows(model)
    device = next(model.parameters()).device
    ids, positions = torch.zeros(1, TOKENS, dtype=torch.long, device=device), torch.arange(TOKENS, device=device)[None]
    mask = torch.zeros(1, 1, TOKENS, TOKENS, dtype=next(p for p in model.parameters() if p.is_floating_point()).dtype, device=device)
    recogniser = rope.RopeSites(ids, positions)
    reports: list[PassReport] = []

    def look(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        reports.append(recogniser.run(gm.graph, Context(Recipe.parse("w8"))))
        raise compat.StopTracing

    with _frozen(model) as changing:
        compiled = torch.compile(lambda **k: model(**k), backend=look, fullgraph=True, dynamic=False)
        try:
            with torch.no_grad():
                compiled(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
        except Exception as error:
            if not compat.is_stop(error):
                raise EditError("E-EDT-ROPE", f"the model cannot be traced in one graph: {str(error).splitlines()[0]}", _STEP) from error
    refused = [d for d in reports[0].decisions if d.action == "kept"]
    if refused:
        d = refused[0]
        raise EditError("E-EDT-ROPE", f"{d.module or d.site}: [{d.code}] {d.reason}", _STEP)
    try:
        found = rope.one(recogniser.found)
    except Refused as error:
        raise EditError("E-EDT-ROPE", f"[{error.code}] {error.reason}", _STEP) from error
    if changing:
        found = replace(found, scaling="dynamic")
    _proved[model] = Positions(found, tuple(r is not None for r in recogniser.found), reports[0])
    return _proved[model]


def refuse_windows(model: Any, length: int | None = None) -> None:
    """Raise EditError (E-EDT-WINDOW) where layers see a window shorter than `length`: tokens would enter and leave it."""
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    odd = sorted(kinds - {"full_attention", "sliding_attention"})
    if odd:
        raise EditError("E-EDT-WINDOW", f"the model has {', '.join(odd)} layers", _STEP)
    if window is not None and (not kinds or "sliding_attention" in kinds) and (length is None or length > window):
        raise EditError("E-EDT-WINDOW", f"the model has layers with a sliding window of {window} tokens, which an edit would move", _STEP)


def rotary_modules(model: nn.Module) -> list[Any]:
    """Modules that own frequencies of a type that follows the length."""
    return [m for m in model.modules() if isinstance(getattr(m, "rope_type", None), str) and isinstance(getattr(m, "inv_freq", None), Tensor)]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[bool]:
    """Keep dynamic frequencies from being recomputed while the model is traced; gives whether there are any."""
    dynamic = [m for m in rotary_modules(model) if "dynamic" in m.rope_type]
    kinds = [m.rope_type for m in dynamic]
    try:
        for m in dynamic:
            m.rope_type = "default"
        yield bool(dynamic)
    finally:
        for m, kind in zip(dynamic, kinds, strict=True):
            m.rope_type = kind


def omega_at(model: nn.Module, length: int) -> Tensor:
    """Frequencies, fp64 on the CPU, that a model of a varying type uses for a text of `length` tokens read at once."""
    modules = rotary_modules(model)
    if len(modules) != 1:
        raise EditError("E-EDT-ROPE", f"{len(modules)} modules own frequencies that follow the length", _STEP)
    own = modules[0]
    x = own.inv_freq.new_zeros(1, 1)
    for last in (0, length - 1):  # position 0 forgets longer texts
        own(x, torch.tensor([[last]], device=x.device))
    return omega_now(model)


def omega_now(model: nn.Module) -> Tensor:
    """Frequencies that the last call of a model of a varying type used, fp64 on the CPU."""
    omega: Tensor = rotary_modules(model)[0].inv_freq
    return omega.detach().double().cpu()
