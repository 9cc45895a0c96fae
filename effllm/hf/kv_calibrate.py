"""What caches learn from text: bases of keys and values (Matryoshka) and orders of channels (sorted block floating point).

    statistics = collect(model, windows)
    cache = CompressedCache(model, "matryoshka(k=32,v=32)", tables=pca_tables(statistics))
    cache = CompressedCache(model, "bfp(bits=4)", tables=sort_tables(statistics))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from effllm.errors import CacheError
from effllm.runtime.caches.matryoshka import pack_tables
from effllm.solvers.kv import ksort
from effllm.solvers.kv.basis import Covariance, pca
from effllm.solvers.kv.weighted import weighted_basis

_NAME = "effllm_queries"
_OUTPUT = ("o_proj", "out_proj", "dense", "c_proj", "wo")


@dataclass
class States:
    """What is known of one layer per key head: covariances of keys and of the queries that meet them (after the rotary embedding) and of
    values, and how the layer weighs values, W_o^T W_o (heads, D, D), None where its output projection was not found."""

    keys: Covariance = field(default_factory=Covariance)
    values: Covariance = field(default_factory=Covariance)
    queries: Covariance = field(default_factory=Covariance)
    output: Tensor | None = None


@torch.no_grad()
def collect(model: Any, windows: Iterable[Tensor]) -> list[States]:
    """Run token ids (S,) or (B, S) through the model and gather, per layer, what its cache would hold. Raises CacheError without any text."""
    states: list[States] = []
    for ids in windows:
        cache = DynamicCache(config=model.config)
        states = states or [States() for _ in cache.layers]
        with _queries(model, states):
            model(input_ids=ids.reshape(-1, ids.shape[-1]), past_key_values=cache, use_cache=True)
        layers: list[Any] = list(cache.layers)
        for own, layer in zip(states, layers, strict=True):
            own.keys.add(layer.keys)
            own.values.add(layer.values)
    if not states:
        raise CacheError("E-KVC-CALIBRATION", "no calibration text", "give some windows of token ids")
    return states


@contextmanager
def _queries(model: Any, states: list[States]) -> Iterator[None]:
    """Inside, attention adds its queries to the statistics of its layer, the query heads of a key head as if they were tokens."""

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
        own, heads = states[module.layer_idx], key.shape[1]
        own.queries.add(query.unflatten(1, (heads, -1)).flatten(2, 3))
        if own.output is None:
            own.output = _output_weight(module, heads, value.shape[-1])
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _output_weight(module: Any, heads: int, dim: int) -> Tensor | None:
    """W_o^T W_o per key head, summed over its query heads."""
    weight = next((w for n in _OUTPUT if isinstance(w := getattr(getattr(module, n, None), "weight", None), Tensor)), None)
    if weight is None or isinstance(getattr(module, "c_proj", None), nn.Module) or weight.shape[1] % (heads * dim):  # Conv1D is transposed
        return None
    w = weight.detach().double().unflatten(1, (heads, -1, dim))  # (N, key heads, query heads of each, D)
    return torch.einsum("ngqd,ngqe->gde", w, w)


def pca_tables(states: list[States]) -> dict[int, list[Tensor]]:
    """Tables of a Matryoshka cache, per layer: principal axes and means."""
    return {i: pack_tables(pca(s.keys.centred), s.keys.mean, pca(s.values.centred), s.values.mean) for i, s in enumerate(states)}


def weighted_tables(states: list[States], ranks: tuple[float, ...] = (0.25, 0.375, 0.5, 0.625, 0.75)) -> dict[int, list[Tensor]]:
    """Tables of a Matryoshka cache that lose least of scores and outputs at `ranks` shares of a head (effllm.solvers.kv.weighted).

    Values of layers whose output projection is not known keep their principal axes.
    """
    dim = states[0].keys.mean.shape[-1]
    grid = sorted({min(dim - 1, max(1, round(r * dim))) for r in ranks})
    eye = torch.eye(dim, dtype=torch.float64)
    outputs = [eye.expand_as(s.values.second) if s.output is None else s.output for s in states]
    keys = weighted_basis(torch.stack([s.keys.centred for s in states]), torch.stack([s.queries.second / s.queries.count for s in states]), grid)
    values = weighted_basis(torch.stack([s.values.centred for s in states]), torch.stack(outputs), grid)
    return {i: pack_tables(keys[i], s.keys.mean, values[i], s.values.mean) for i, s in enumerate(states)}


def sort_tables(states: list[States], way: str = "post", *, values: bool = False, rotary: int | None = None, block: int = 32) -> dict[int, list[Tensor]]:
    """Tables of a block-floating-point cache, per layer: the order of key channels in the way "none", "post" or "layout" of solvers.kv.ksort, for blocks
    of `block` channels and by what the error of a channel costs: energy of keys and of queries.

    `values` sorts value channels too, by their energy and the output projection's; they have no pairs. `rotary` channels of a head are rotated, default
    all. Raises CacheError (E-KVC-VALUE).
    """
    ways: dict[str, Callable[..., Tensor]] = {"none": _unsorted, "post": ksort.channel_order, "layout": ksort.layout_order}
    if way not in ways:
        raise CacheError("E-KVC-VALUE", f"way={way!r}", f"valid: {', '.join(ways)}; for 'pair' see effllm.hf.kv_sort")
    out = {}
    for i, s in enumerate(states):
        keys, queries, held = (torch.diagonal(c.second, dim1=-2, dim2=-1) for c in (s.keys, s.queries, s.values))
        order = ways[way](keys, rotary, queries, block)
        read = torch.ones_like(held) if s.output is None else torch.diagonal(s.output, dim1=-2, dim2=-1)
        out[i] = [order, ksort.channel_order(held, None, read, block) if values else _unsorted(held)]
    return out


def _unsorted(energy: Tensor, *rest: object) -> Tensor:
    return torch.arange(energy.shape[-1], device=energy.device).repeat(energy.shape[0], 1)
