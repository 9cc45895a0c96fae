"""What torch and transformers offer for long contexts, as counterparts of effllm's caches: torch's attention in a compiled step, growing caches,
and transformers' own quantized ones, whose 2 and 4 bits need optimum-quanto."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import DynamicCache

from effllm.passes import pipeline
from effllm.passes.attention import Attention

GROUP, RESIDUAL = 64, 128  # of transformers' quantized caches, its defaults
GROWING = ("torch-dynamic", "quanto-4", "quanto-2")


@contextlib.contextmanager
def torch_attention() -> Iterator[None]:
    """What is compiled meanwhile keeps torch's scaled dot product attention; everything else is rewritten."""
    passes: Callable[[], list[Any]] = pipeline.default
    with mock.patch.object(pipeline, "default", lambda: [p for p in passes() if not isinstance(p, Attention)]):
        yield


def quanto_layer(bits: int) -> Any:
    """An empty layer of `QuantizedCache("quanto")`: groups of 64, the last 128 tokens or fewer exact."""
    from transformers.cache_utils import QuantoQuantizedLayer

    return QuantoQuantizedLayer(nbits=bits, q_group_size=GROUP, residual_length=RESIDUAL)


def quantized(keys: Tensor, values: Tensor, bits: int) -> Any:
    """A layer that holds keys and values (B, G, T, D), all of them packed, as after a prompt."""
    layer = quanto_layer(bits)
    layer.update(keys, values)
    return layer


def quanto_cache(model: Any, bits: int) -> Any:
    """transformers' QuantizedCache of a model, empty."""
    from transformers import QuantizedCache

    return QuantizedCache("quanto", model.config, nbits=bits, q_group_size=GROUP, residual_length=RESIDUAL)


def quanto_sizes(bits: int, heads: int, dim: int) -> dict[str, float]:
    """Bytes of one layer and token: codes, and a scale and a shift of 16 bits a group. None stay exact behind a prompt, up to 128 while decoding."""
    dense = 4.0 * heads * dim
    share = (bits + 32 / GROUP) / 16
    held = {"bytes": share * dense, "formula": share * dense, "share": share}
    return held | {"total_share_4k": (share * (4096 - RESIDUAL) + RESIDUAL) / 4096}


def packed_bytes(layer: Any) -> int:
    """Bytes of a layer's codes, scales and shifts and of its exact tokens."""
    total = sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))
    for packed in (layer._quantized_keys, layer._quantized_values):
        codes = packed._data._data if hasattr(packed._data, "_data") else packed._data  # two or four codes a byte
        total += sum(t.numel() * t.element_size() for t in (codes, packed._scale, packed._shift))
    return total


class Growing:
    """A model that is not compiled, with a cache that grows by concatenation. Stands in for a StaticRunner in decoding steps."""

    def __init__(self, name: str, model: Any, longest: int) -> None:
        config = model.config
        shape = (1, config.num_key_value_heads, longest, config.hidden_size // config.num_attention_heads)
        g = torch.Generator().manual_seed(1)
        self._states = [torch.randn(shape, generator=g).to(model.dtype) for _ in range(2)]
        self._bits = None if name == "torch-dynamic" else int(name[-1])
        self._model, self._layers = model, len(model.model.layers)
        self._at, self._cache, self._kept = 0, DynamicCache(), []

    @torch.no_grad()
    def behind(self, tokens: int) -> int:
        """Let every layer hold so many tokens, in memory of its own."""
        if tokens != self._at:
            self._at, self._cache, k = tokens, DynamicCache(), [t[:, :, :tokens] for t in self._states]
            for n in range(self._layers):
                if self._bits is None:
                    self._cache.update(k[0].clone(), k[1].clone(), n)
                else:
                    self._cache.layers.append(quantized(k[0], k[1], self._bits))
            self._kept = [dict(vars(layer)) for layer in self._cache.layers]
        for layer, state in zip(self._cache.layers, self._kept, strict=True):
            vars(layer).update(state)
        return tokens

    @torch.no_grad()
    def decode_step(self, token: Tensor, position: Tensor) -> Tensor:
        """Logits (1, V) after one more token (1, 1) at a position (1, 1)."""
        logits: Tensor = self._model(input_ids=token, position_ids=position, past_key_values=self._cache, use_cache=True).logits
        return logits[:, -1]

    @property
    def cache_bytes(self) -> int:
        """Bytes of the tokens held."""
        if self._bits is None:
            return sum(t.numel() * t.element_size() for layer in self._cache.layers for t in (layer.keys, layer.values))
        return sum(packed_bytes(layer) for layer in self._cache.layers)
