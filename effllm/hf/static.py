"""A causal LM with static caches and one compiled graph each for prefill and decode: what the bench times.

All shapes are fixed, so there are exactly two graphs: prefill takes (1, P) ids, decode takes (1, 1). Both return the last
position's logits (1, V). Prompts of other lengths run in eager mode, and so does prefill with `compile_prefill=False`
(half the compile time).
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from effllm.hf.cache import CompressedCache
from effllm.hf.cache_layer import CompressedLayer
from effllm.runtime.replay import Replay, recording

Compile = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]


class StaticRunner:
    """Greedy decoding of batch 1. `length` is the size of the decode cache, `prefill_length` that of the prefill graph, `kv` the format
    of both caches (see hf.cache), None for dense ones."""

    def __init__(
        self, model: Any, compile: Compile | None = None, *, length: int, prefill_length: int, compile_prefill: bool = True, kv: str | None = None
    ) -> None:
        self.model = model
        self.device = next(t.device for t in (*model.parameters(), *model.buffers()))
        self.length, self.prefill_length, self.kv = length, prefill_length, kv
        self._cache = _cache(model, length, self.device, kv)
        self._prefill_cache = _cache(model, prefill_length, self.device, kv)
        self._read: tuple[Tensor, Tensor, list[dict[str, Tensor]]] | None = None  # last prompt, its logits, and the state behind it
        # one code object per graph: Dynamo keeps compiled graphs per code object, and variants must not see each other's
        self._prefill = _fresh(_step) if compile is None or not compile_prefill else compile(_fresh(_step))
        self._decode = _fresh(_step) if compile is None else compile(_fresh(_step))
        # caches whose update is nothing but tensor operations; others count in Python, which a replay would miss
        self._simple = all(type(layer) in (StaticLayer, CompressedLayer) for layer in self._cache.layers)
        self._replay: Replay | None = None

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> tuple[Tensor, Any]:
        """Logits (1, V) after a prompt (1, prefill_length), and the cache that holds it."""
        self._prefill_cache.reset()
        positions = torch.arange(ids.shape[1], device=self.device)[None]
        return self._prefill(self.model, ids, positions, self._prefill_cache), self._prefill_cache

    @torch.no_grad()
    def start(self, ids: Tensor) -> Tensor:
        """Empty the decode cache and read a prompt (1, S) into it, in eager mode; logits (1, V). The same prompt again is not read again."""
        if self._read is not None and torch.equal(self._read[0], ids):
            for layer, state in zip(self._cache.layers, self._read[2], strict=True):
                for name, value in state.items():
                    getattr(layer, name).copy_(value)
            return self._read[1].clone()
        self._cache.reset()
        positions = torch.arange(ids.shape[1], device=self.device)[None]
        logits = _step(self.model, ids, positions, self._cache)
        # enough to come back: what lies behind the prompt is overwritten or hidden
        kept = ("lens", "ring") if isinstance(self._cache, CompressedCache) else ("cumulative_length",)
        states = [{n: getattr(layer, n).clone() for n in kept} for layer in self._cache.layers]
        self._read = (ids.clone(), logits.clone(), states) if self._simple else None
        return logits

    @property
    def cache_bytes(self) -> int:
        """Bytes of the decode cache."""
        if isinstance(self._cache, CompressedCache):
            return self._cache.nbytes
        return sum(t.numel() * t.element_size() for layer in self._cache.layers for t in (layer.keys, layer.values))

    @torch.no_grad()
    def decode_step(self, token: Tensor, position: Tensor) -> Tensor:
        """Logits (1, V) after one more token (1, 1) at a position (1, 1). The model must be the one of the first step, unchanged."""
        found = self._replay(token, position) if self._replay is not None else None
        if found is not None:
            return found
        with recording() as calls:
            logits = self._decode(self.model, token, position, self._cache)
        if self._simple:
            self._replay = Replay.of(calls, logits, (token, position))
        return logits

    def decode(self, logits: Tensor, at: int, count: int) -> tuple[list[int], list[Tensor]]:
        """`count` greedy tokens that follow `logits` at position `at`: token ids, and the logits each step gave."""
        tokens, outs = [], []
        for i in range(count):
            token = logits.argmax(-1, keepdim=True)
            tokens.append(int(token))
            logits = self.decode_step(token, torch.tensor([[at + i]], device=self.device))
            outs.append(logits)
        return tokens, outs


def _step(model: Any, ids: Tensor, positions: Tensor, cache: Any) -> Tensor:
    logits: Tensor = model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1]


def _fresh(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return types.FunctionType(step.__code__.replace(), step.__globals__, step.__name__)


def _cache(model: Any, length: int, device: torch.device, kv: str | None) -> Any:
    if kv is not None:
        return CompressedCache(model, kv, length).prepare(model)
    config = model.config.get_text_config(decoder=True)
    cache = StaticCache(config=config, max_cache_len=length)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # allocated before tracing: a cache that is made inside a graph has no static address
    cache.early_initialization(1, heads, size, model.dtype, device)
    return cache
