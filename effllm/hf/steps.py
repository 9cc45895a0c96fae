"""Forwards of one model on static caches, each shape compiled once: what the static decode loops run on.

A shape is (rows, tokens, capacity, kind of mask, what comes out). Shapes are few by design (hf/slots.bucket, prompt buckets), and each has a
code object of its own, so that Dynamo never meets a second shape and never recompiles. Graphs are kept per model and shared by all calls,
streams and threads; caches are not shared, a call borrows one.

Dynamo looks at the model's modules, weights and caches before every step, which takes a sixth of a step of the demo model. Here that is done
once a call of `effllm.generate`: modules, parameters or buffers that are not those of the last call make new graphs, and within a call
compiled steps are repeated as they were recorded (runtime/replay.py).
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from effllm import compat
from effllm.errors import OptionError
from effllm.hf.slots import Slots
from effllm.hf.steady import steady_guards
from effllm.recipe import Recipe
from effllm.runtime.replay import Replay, recording

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Compiled:
    """How static steps are compiled. `recipe`: what the backend does to weights that are still dense; the default leaves their numbers alone.

    `prefill`: prompts, too, padded to buckets; else they are read by the eager model, without padding. `capacity`: tokens of the cache, a power of
    two that suffices by default; give it so that calls of different lengths share graphs. `options`: more options of the effllm backend. `wrap`
    replaces torch.compile altogether.
    """

    recipe: str = "dense"
    prefill: bool = False
    capacity: int | None = None
    options: tuple[tuple[str, Any], ...] = ()
    wrap: Wrap | None = None

    @staticmethod
    def parse(given: Any) -> Compiled | None:
        """`compile=` of effllm.generate: False or None, True, a recipe, a dict of fields and backend options, or a function that wraps a function.

        Raises OptionError (E-OPT-COMPILE) and what the backend raises for its options.
        """
        if given is None or given is False:
            return None
        if isinstance(given, Compiled):
            return given
        if given is True:
            return Compiled()
        if callable(given):
            return Compiled(wrap=given)
        fields = {"recipe": given} if isinstance(given, str) else given
        if not isinstance(fields, dict):
            raise OptionError("E-OPT-COMPILE", f"compile={given!r}", "give True, a recipe such as 'w8', or a dict of recipe, prefill, capacity and options")
        known = {k: v for k, v in fields.items() if k in ("recipe", "prefill", "capacity")}
        made = Compiled(**known, options=tuple(sorted((k, v) for k, v in fields.items() if k not in known)))
        if Recipe.parse(made.recipe).kv is not None:
            raise OptionError("E-OPT-COMPILE", f"the recipe {made.recipe!r} has a kv part", "pass cache=, without compile=")
        from effllm.backend import Options

        Options.parse({"recipe": made.recipe, **dict(made.options)}, None)
        return made

    @property
    def key(self) -> tuple[Any, ...]:
        """What graphs depend on."""
        return (self.recipe, repr(self.options), self.wrap)

    def function(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled step."""
        if self.wrap is not None:
            return self.wrap(step)
        import effllm.backend  # noqa: F401 - registers the backend for a checkout that is not installed

        options = {"guard_filter_fn": steady_guards, "recipe": self.recipe, **dict(self.options)}
        return torch.compile(step, fullgraph=True, dynamic=False, backend="effllm", options=options)


@dataclass
class Steps:
    """The forwards of a model, eager where `compiled` is None. They take the model as an argument: a graph must not keep it alive."""

    compiled: Compiled | None
    graphs: dict[tuple[Any, ...], Callable[..., Any]] = field(default_factory=dict)
    idle: dict[tuple[int, int], list[Slots]] = field(default_factory=dict)
    seen: list[weakref.ref[Any]] = field(default_factory=list)
    state: tuple[Any, ...] = ()
    lock: threading.Lock = field(default_factory=threading.Lock)

    @torch.inference_mode(False)
    @torch.no_grad()
    def run(
        self, model: Any, cache: Slots, ids: Tensor, positions: Tensor, mask: Any = None, keep: int | Tensor = 1,
        *, hidden: bool = False, eager: bool = False, choose: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Logits (B, k, V) after ids (B, n) at positions (B, n), and the last hidden states (B, n, H) if wanted; the cache grows by n.

        mask: None for causal, (B, capacity) for padding, (1, 1, n, capacity) or a dict of those for a tree. keep: how many of the last rows of logits,
        0 for all, or the rows (k,). hidden: all rows, of a draft. eager: without compiling, for shapes that come once. choose: instead of logits
        where they are largest, (B, k).
        """
        step: Callable[..., Any] = _step
        if self.compiled is not None and not eager:
            kind = ("tree", len(mask)) if isinstance(mask, dict) else 0 if mask is None else mask.dim()
            key = (*ids.shape, cache.capacity, kind, keep if isinstance(keep, int) else ("rows", len(keep)), hidden, choose)
            with self.lock:
                if key not in self.graphs:
                    self.graphs[key] = self.compiled.function(compat.fresh(_step))
                step = self.graphs[key]
        ids, positions, mask, keep = tree_map_only(Tensor, _normal, (ids, positions, mask, keep))
        if step is _step:
            logits, last = step(model, ids, positions, mask, cache, keep, hidden, choose)
        else:
            with self.lock:  # compiled steps may have scratch memory of their own
                logits, last = self._compiled(step, model, ids, positions, mask, cache, keep, hidden, choose)
        cache.length += ids.shape[1]
        return logits, last

    def again(self, cache: Slots, *changing: Tensor) -> Tensor | None:
        """What a step like the last compiled one on this cache gives first, `changing` (ids, positions, perhaps a mask) aside; None where it has to go
        through `run`. What `run` looks up and sets up around a native step is a tenth of the step."""
        replay = cache.latest
        if replay is None:
            return None
        with self.lock:
            logits: Tensor | None = replay(*changing)
        if logits is not None:
            cache.length += changing[0].shape[1]
        return logits

    def _compiled(
        self, step: Callable[..., Any], model: Any, ids: Tensor, positions: Tensor, mask: Any, cache: Slots, keep: Any, hidden: bool, choose: bool
    ) -> Any:
        """A compiled step: through Dynamo the first time that a call of `generate` comes to it, then by itself."""
        changing = [ids, positions] if mask is None else [ids, positions, mask]
        known = cache.replays.get(step)
        found = known(*changing) if known is not None else None
        if known is not None and found is not None:
            cache.latest = known if known.bound else None
            return found, None
        cache.latest = None
        with recording() as calls:
            logits, last = _guarded(step, model, ids, positions, mask, cache, keep, hidden, choose)
        if step not in cache.replays:
            fits = last is None and isinstance(keep, int) and not isinstance(mask, dict)
            cache.replays[step] = Replay.of(calls, logits, changing) if fits else None
        return logits, last

    @contextlib.contextmanager
    def borrow(self, model: Any, batch: int, capacity: int) -> Iterator[Slots]:
        """A cache for one call. On a GPU one of each size is kept for the next call, since CUDA graphs know addresses."""
        with self.lock:
            waiting = self.idle.setdefault((batch, capacity), [])
            cache = waiting.pop() if waiting else None
        if cache is None:
            cache = Slots(model.config.get_text_config(decoder=True).num_hidden_layers, capacity)
            if self.compiled is not None and self.compiled.prefill:
                cache.allocate(model, batch)
        cache.seek(0)
        try:
            yield cache
        finally:
            cache.replays.clear()  # they hold the model's weights
            cache.latest = None
            with self.lock:
                if not waiting and model.device.type != "cpu":
                    waiting.append(cache)


_steps: weakref.WeakKeyDictionary[Any, dict[Any, Steps]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def steps_of(model: Any, compiled: Compiled | None) -> Steps:
    """The steps of a model under a setting; new ones where the model's modules or tensors are not those that the graphs were made of."""
    modules = list(model.modules())
    tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    parts = [*modules, *tensors]
    # a cast keeps a parameter's identity
    state = (compat.attention_implementation(model.config), *(m.training for m in modules), *((t.dtype, t.device) for t in tensors))
    with _lock:
        by_key = _steps.setdefault(model, {})
        key = None if compiled is None else compiled.key
        found = by_key.get(key)
        if found is None or found.state != state or len(found.seen) != len(parts) or any(r() is not p for r, p in zip(found.seen, parts, strict=True)):
            found = by_key[key] = Steps(compiled, seen=[weakref.ref(p) for p in parts], state=state)
        found.compiled = compiled
        return found


def forget(model: Any) -> None:
    """Drop a model's graphs and idle caches."""
    with _lock:
        _steps.pop(model, None)


def _step(model: Any, ids: Tensor, positions: Tensor, mask: Any, cache: Any, keep: Any, hidden: bool, choose: bool) -> tuple[Tensor, Tensor | None]:
    if hidden:
        # not output_hidden_states, which Dynamo cannot follow. What some models do behind the head (soft caps, scales) is left out: a draft's
        # distribution may be any, as long as it is the one that is drawn from
        last: Tensor = model.base_model(input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True).last_hidden_state
        return model.get_output_embeddings()(last), last
    out = model(input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=keep)
    return out.logits.argmax(-1) if choose else out.logits, None


def _normal(t: Tensor) -> Tensor:
    """A caller under inference_mode makes tensors of a kind of their own, which Dynamo would compile for anew."""
    return t.clone() if t.is_inference() else t


def _guarded(step: Callable[..., Any], model: Any, *args: Any) -> Any:
    """A compiled step; a model that cannot be captured is the user's to know."""
    try:
        return step(model, *args)
    except Exception as error:
        if not compat.is_capture_error(error):
            raise
        cause = f"{type(model).__name__} cannot be captured in one graph: {str(error).strip().splitlines()[0]}"
        raise OptionError("E-OPT-COMPILE", cause, "leave compile= out") from error
