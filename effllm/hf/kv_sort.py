"""K-sort at compile time: the weights themselves are permuted, along dimensions that the graph of coupled dimensions finds.

Way "pair" of effllm.solvers.kv.ksort: pairs of rotary channels move in queries, keys and frequencies of all layers alike, by the energy of the rows of
the key projections over that of the query projections. Frequencies are in no checkpoint, so a model sorted this way is not to be saved. Values are
sorted per head together with the columns of the output projection, by the rows of the one over the columns of the other; that is exact and may be saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effllm.coupling import CoupledGraph, channel_energy, channel_order, permute
from effllm.coupling.dimension import Dimension
from effllm.errors import CacheError


def sort_weights(model: Any, input_ids: Tensor, *, pairs: bool = True, values: bool = True) -> list[str]:
    """Permute the model in place; its outputs stay what they are up to rounding. Returns one line per dimension that was sorted.

    input_ids (1, S) is an example for the capture. Raises CacheError (E-KVC-SORT) where the model has no such dimension, CouplingError where it
    cannot be captured.
    """
    graph = CoupledGraph.of(model, {"input_ids": input_ids}, output="logits")
    weights = dict(model.named_parameters())
    done = []
    if pairs:
        rotary = [d for d in graph.dimensions if d.structure.rotary and not d.pinned]
        if not rotary:
            raise CacheError("E-KVC-SORT", "no rotary pairs were found that may be reordered", "sort after the rotation instead: sort_tables(way='post')")
        done += [_sort(model, d, weights, (_named(d, "k_proj"), _named(d, "q_proj", axis=0)), volatile=True) for d in rotary]
    if values:
        free = [d for d in graph.dimensions if not d.pinned and not d.structure.rotary and d.structure.unit == 1 and _named(d, "v_proj", axis=0)]
        if not free:
            raise CacheError("E-KVC-SORT", "no value channels were found that may be reordered", "leave values unsorted")
        done += [_sort(model, d, weights, (_named(d, "v_proj", axis=0), _named(d, "o_proj", axis=1)), volatile=False) for d in free]
    return done


def _named(d: Dimension, word: str, axis: int | None = None) -> list[str]:
    """Weights of a dimension with the word in their names; all of them where none has it and no axis is asked for (fused projections)."""
    found = [m.parameter for m in d.members if word in m.parameter and m.parameter.endswith("weight") and axis in (None, m.axis)]
    return found or ([] if axis is not None else [m.parameter for m in d.members if m.parameter.endswith("weight")])


def _sort(model: Any, d: Dimension, weights: dict[str, Tensor], names: tuple[list[str], list[str]], *, volatile: bool) -> str:
    """By the energy of what is stored over that of what reads it, where that is known: see solvers.kv.ksort."""
    stored, reads = (channel_energy(d, {n: weights[n] for n in part}) for part in names)
    order = channel_order(d, stored / reads.clamp_min(1e-30) if names[1] else stored)
    permute(model, d, order, volatile=volatile)
    moved = int((order != torch.arange(d.size)).sum())
    return f"{d.structure}: {moved} of {order.numel()} channels moved in {len(d.members)} places"
