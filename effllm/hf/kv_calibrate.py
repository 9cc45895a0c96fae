"""What caches learn from text: bases of keys and values (Matryoshka) and orders of channels (sorted block floating point).

    statistics = collect(model, windows)
    cache = CompressedCache(model, "matryoshka(k=32,v=32)", tables=pca_tables(statistics))
    cache = CompressedCache(model, "bfp(bits=4)", tables=sort_tables(statistics))
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from effllm.errors import CacheError
from effllm.runtime.caches.matryoshka import pack_tables
from effllm.solvers.kv import ksort
from effllm.solvers.kv.basis import Covariance, pca


@dataclass
class States:
    """Covariances of the keys (after the rotary embedding) and of the values of one layer."""

    keys: Covariance = field(default_factory=Covariance)
    values: Covariance = field(default_factory=Covariance)


@torch.no_grad()
def collect(model: Any, windows: Iterable[Tensor]) -> list[States]:
    """Run token ids (S,) or (B, S) through the model and gather, per layer, what its cache would hold. Raises CacheError without any text."""
    states: list[States] = []
    for ids in windows:
        cache = DynamicCache(config=model.config)
        model(input_ids=ids.reshape(-1, ids.shape[-1]), past_key_values=cache, use_cache=True)
        states = states or [States() for _ in cache.layers]
        layers: list[Any] = list(cache.layers)
        for own, layer in zip(states, layers, strict=True):
            own.keys.add(layer.keys)
            own.values.add(layer.values)
    if not states:
        raise CacheError("E-KVC-CALIBRATION", "no calibration text", "give some windows of token ids")
    return states


def pca_tables(states: list[States]) -> dict[int, list[Tensor]]:
    """Tables of a Matryoshka cache, per layer: principal axes and means."""
    return {i: pack_tables(pca(s.keys.centred), s.keys.mean, pca(s.values.centred), s.values.mean) for i, s in enumerate(states)}


def sort_tables(states: list[States], way: str = "post", *, values: bool = False, rotary: int | None = None) -> dict[int, list[Tensor]]:
    """Tables of a block-floating-point cache, per layer: key channels by energy, in the way "none", "post" or "layout" of solvers.kv.ksort.

    `values` sorts value channels too; they have no pairs. `rotary` channels of a head are rotated, default all. Raises CacheError (E-KVC-VALUE).
    """
    ways = {"none": _unsorted, "post": ksort.channel_order, "layout": ksort.layout_order}
    if way not in ways:
        raise CacheError("E-KVC-VALUE", f"way={way!r}", f"valid: {', '.join(ways)}; for 'pair' see effllm.hf.kv_sort")
    out = {}
    for i, s in enumerate(states):
        energies = [torch.diagonal(c.second, dim1=-2, dim2=-1) for c in (s.keys, s.values)]
        order = ways[way](energies[0], rotary)
        out[i] = [order, ksort.channel_order(energies[1]) if values else _unsorted(energies[1], None)]
    return out


def _unsorted(energy: Tensor, rotary: int | None) -> Tensor:
    return torch.arange(energy.shape[-1], device=energy.device).repeat(energy.shape[0], 1)
