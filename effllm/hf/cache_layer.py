"""A compressed cache layer as transformers' cache layer (5.x signatures; the 4.57 names of methods are there too)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from effllm.runtime.caches.base import CacheFormat
from effllm.runtime.caches.layer import Layer


class CompressedLayer(Layer, CacheLayerMixin):  # type: ignore[misc]
    """One layer of a `CompressedCache`; see effllm.runtime.caches.layer.Layer for capacity and tables."""

    is_sliding = False
    is_croppable = True

    def __init__(self, fmt: CacheFormat | str, capacity: int | None = None, tables: Sequence[Tensor] | None = None) -> None:
        CacheLayerMixin.__init__(self)
        Layer.__init__(self, fmt, capacity, tables)

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """A static cache is; one that grows changes its tensors between steps."""
        return self.capacity is not None

    @property
    def is_initialized(self) -> bool:
        """Whether the tensors are allocated."""
        return self.__dict__.get("ready", False)

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:  # transformers' constructor sets it
        del value

    @property
    def batch_size(self) -> int:
        """Rows; AttributeError before the first use, which is how transformers asks."""
        if not self.ready:
            raise AttributeError("batch_size")
        return int(self.start.shape[0])

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Allocate for states (B, G, any, D)."""
        self.allocate(key_states, key_states if value_states is None else value_states)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Keys that the mask has to cover, and their offset."""
        if self.capacity is not None:
            return (self.limit if self.ready else self.full), 0
        more = query_length if isinstance(query_length, int) else int(query_length.shape[0])
        return (int(self.lens[0]) if self.ready else 0) + more, 0

    def get_seq_length(self) -> Any:
        """Tokens held: a 0-d tensor of its own for a static cache, so that compiled steps do not depend on the number; else an int."""
        if not self.ready:
            return 0
        return self.lens[0].clone() if self.capacity is not None else int(self.lens[0])

    def get_max_length(self) -> int:
        """Most tokens, -1 for a cache that grows."""
        return -1 if self.capacity is None else self.full

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget all tokens."""
        Layer.reset(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest -`tokens_to_remove` tokens. Raises ValueError for a positive number, CacheError (E-KVC-CROP) beyond the window."""
        if tokens_to_remove > 0:
            raise ValueError("crop takes the number of tokens to remove as a negative number")
        Layer.crop(self, -tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """For beam search; in place."""
        self.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self.select(indices)

    def offload(self) -> None:
        """Refused: the tensors have static addresses."""
        raise NotImplementedError("compressed caches are not offloaded; they are small")

    prefetch = offload

    def __repr__(self) -> str:
        return f"CompressedLayer({self.format.spec}, capacity={self.capacity})"
