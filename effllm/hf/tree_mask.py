"""The attention mask of a forward over tree nodes, in the form that a transformers model takes untouched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effllm import compat
from effllm.errors import PromptError


class TreeMask:
    """Makes masks (1, 1, n, capacity), or a dict of them by layer type where a model's layers differ."""

    def __init__(self, model: Any) -> None:
        """Raises PromptError (E-PRM-ATTENTION) where the attention implementation takes no such mask."""
        self.implementation = compat.attention_implementation(model.config).rpartition("+")[2]
        if self.implementation not in ("sdpa", "eager"):
            raise PromptError("E-PRM-ATTENTION", f"{self.implementation} attention takes no tree mask", 'use speculative="chain(...)", or sdpa attention')
        text = model.config.get_text_config(decoder=True)
        types = sorted(set(getattr(text, "layer_types", None) or ()))
        window = getattr(text, "sliding_window", None)
        self.windows: dict[str, int | None] = {t: window if t == "sliding_attention" else None for t in types} or {"": window}
        self.dtype = model.dtype

    def __call__(self, seen: Tensor, queries: Tensor, keys: Tensor, device: torch.device) -> Any:
        """`seen` (n, capacity) bool; positions of queries (n,) and of what is in the slots (capacity,), for sliding windows."""
        made = {}
        for name, window in self.windows.items():
            mask = seen if window is None else seen & (queries[:, None] - keys[None] < window)
            if self.implementation == "eager":
                mask = torch.zeros(mask.shape, dtype=self.dtype).masked_fill(~mask, torch.finfo(self.dtype).min)
            made[name] = mask[None, None].to(device)
        return made if len(made) > 1 else next(iter(made.values()))
