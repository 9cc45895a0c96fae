"""The evicting cache (EMS, approximate) for transformers: attention that lets the cache see the queries.

    cache = EvictingCache(model, Ems(budget=256))
    with observing(model):
        model.generate(**inputs, past_key_values=cache)

Not compiled: which tokens stay is decided between steps. Prompts of one length only: padding is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from effllm.errors import CacheError
from effllm.hf.cache import CompressedCache
from effllm.report import Decision
from effllm.runtime.caches.ems import Ems, EvictingLayer

NAME = "effllm_observing"
_OWNER = "_effllm_layer"


class EvictingCacheLayer(EvictingLayer, CacheLayerMixin):  # type: ignore[misc]
    """An EvictingLayer as transformers' cache layer."""

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, settings: Ems) -> None:
        CacheLayerMixin.__init__(self)
        EvictingLayer.__init__(self, settings)

    @property
    def is_initialized(self) -> bool:
        """Whether the tensors are allocated."""
        return bool(self.__dict__.get("ready", False))

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:  # transformers' constructor sets it
        del value

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Allocate."""
        self.allocate(key_states, key_states if value_states is None else value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kw: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Append; the keys know whose they are, so that attention can report back."""
        keys, values = EvictingLayer.update(self, key_states, value_states)
        setattr(keys, _OWNER, self)
        return keys, values

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Kept tokens count as the ones right before the new ones: all visible, the new ones causal."""
        new = query_length if isinstance(query_length, int) else int(query_length.shape[0])
        return self.count + new, self.length - self.count

    def get_seq_length(self) -> int:
        """Tokens seen, which is what positions follow."""
        return self.length

    def get_max_length(self) -> int:
        """Without limit."""
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget all tokens."""
        EvictingLayer.reset(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest -`tokens_to_remove` tokens."""
        if tokens_to_remove > 0:
            raise ValueError("crop takes the number of tokens to remove as a negative number")
        EvictingLayer.crop(self, -tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """For beam search."""
        self.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self.select(indices)


class EvictingCache(CompressedCache):
    """One EvictingCacheLayer per layer with full attention; others stay as transformers makes them, with a Decision."""

    def __init__(self, model: Any, settings: Ems | None = None) -> None:
        self.settings = settings or Ems()
        config = getattr(model, "config", model).get_text_config(decoder=True)
        self.decisions = []
        layers: list[Any] = []
        for i, layer in enumerate(DynamicCache(config=config).layers):
            own = type(layer) is DynamicLayer
            layers.append(EvictingCacheLayer(self.settings) if own else layer)
            reason = "approximate: tokens are dropped for good" if own else f"is a {type(layer).__name__}: stays as it is"
            self.decisions.append(Decision(f"cache.{i}", f"layers.{i}", "applied" if own else "kept", "evicting" if own else "other-cache", reason))
        Cache.__init__(self, layers=layers)
        if not self.compressed:
            raise CacheError("E-KVC-MODEL", "no layer of the model keeps whole keys and values", "such models have nothing to evict")

    @property
    def compressed(self) -> list[Any]:
        """The evicting layers."""
        return [layer for layer in self.layers if isinstance(layer, EvictingCacheLayer)]


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:  # fmt: skip
    layer = getattr(key, _OWNER, None)
    if layer is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        return out, None
    n, t = query.shape[2], key.shape[2]
    causal = torch.arange(t, device=query.device) <= torch.arange(t - n, t, device=query.device)[:, None]
    if attention_mask is not None:
        given = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
        if not bool((given == causal).all()):
            raise CacheError("E-KVC-PADDING", "the batch is padded, or its mask is not causal", "evicting caches take prompts of one length")
    extra = layer.bias()
    mask: Tensor | None = causal
    if extra is not None:
        wide = extra.repeat_interleave(query.shape[1] // key.shape[1], 1)[:, :, None].to(query.dtype)
        mask = wide.expand(-1, -1, n, -1).masked_fill(~causal, -torch.inf)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    layer.observe(query, scale)
    return out.transpose(1, 2).contiguous(), None


@contextmanager
def observing(model: Any) -> Iterator[Any]:
    """Inside, the model's attention reports its queries to evicting caches; other caches work as before."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield model
    finally:
        model.set_attn_implementation(before)
