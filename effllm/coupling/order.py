"""Legal permutations from scores: sort the channels of a dimension, or group them for an N:M mask."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from effllm.coupling.dimension import Dimension, Member
from effllm.coupling.nm import Improved, improve_nm
from effllm.errors import CouplingError

Scores = Mapping[str, Tensor] | Mapping[tuple[str, int], Tensor]


def channel_order(dimension: Dimension, score: Tensor, *, descending: bool = True) -> Tensor:
    """The permutation that sorts channels by score, block by block, equal ones in their old order; shape `structure.shape`.

    score: (size,) or (*blocks, size). Raises CouplingError E-CPL-SCORE for another shape or values that cannot be sorted.
    """
    structure = dimension.structure
    if tuple(score.shape) not in ((structure.size,), structure.shape):
        raise CouplingError("E-CPL-SCORE", f"scores of shape {tuple(score.shape)} for {structure.shape} channels", f"one score per channel of: {structure}")
    if bool(torch.isnan(score).any()):
        raise CouplingError("E-CPL-SCORE", "a score is not a number", "look at the statistics that it comes from")
    return torch.argsort(score.detach().cpu().expand(structure.shape), dim=-1, descending=descending, stable=True)


def channel_energy(dimension: Dimension, tensors: Mapping[str, Tensor]) -> Tensor:
    """Sum of squares of every channel over the given members, shape `structure.shape`; tensors by the members' parameter names."""
    blocks, size = dimension.structure.blocks, dimension.size
    total = torch.zeros(prod(blocks), size, dtype=torch.float64)
    for m in dimension.members:
        if m.parameter in tensors:
            total += _rows(tensors[m.parameter].double().square(), m, dimension).sum(2)
    return total.reshape(dimension.structure.shape)


def nm_order(dimension: Dimension, scores: Scores, n: int, m: int, **options: Any) -> Improved:
    """The permutation that lets N:M masks of the consumers keep most; `options` are those of `improve_nm`.

    scores: of a consumer's weight, in the weight's shape, by its name, or by (name, axis) where both axes are members. Groups of M lie along the
    member's axis. Raises CouplingError for parameters that are not members, shapes that are not theirs, and groups that a legal permutation
    cannot refill (whole blocks, channels that are not neighbours).
    """
    made: list[Tensor] = []
    for key, score in scores.items():
        name, axis = key if isinstance(key, tuple) else (key, None)
        members = [x for x in dimension.members if x.parameter == name and (x.axis == axis if axis is not None else x.summed)]
        if not members:
            consumers = ", ".join(f"{x.parameter}[{x.axis}]" for x in dimension.consumers) or "none"
            raise CouplingError("E-CPL-SCORE", f"{name} does not consume dimension {dimension.index}", f"consumers: {consumers}")
        for x in members:
            if score.dim() <= x.axis or score.shape[x.axis] != x.axis_size:
                raise CouplingError("E-CPL-SCORE", f"scores of {name} have shape {tuple(score.shape)}", f"axis {x.axis} has {x.axis_size} places")
            if x.stride != 1 or x.offset % m or any(loop.stride % m for loop in x.loops):
                cause = f"groups of {m} on {name}[{x.axis}] are not groups of channels ({dimension.structure})"
                raise CouplingError("E-CPL-PATTERN", cause, "permute a finer dimension")
            made.append(_rows(score.float(), x, dimension).permute(2, 0, 1).reshape(-1, prod(dimension.structure.shape)))
    return improve_nm(made, n, m, dimension.structure, **options)


def _rows(tensor: Tensor, member: Member, dimension: Dimension) -> Tensor:
    """A member's values as (blocks, channels, rows)."""
    places = member.places(dimension.size, dimension.structure.blocks)
    flat = tensor.detach().cpu().movedim(member.axis, 0).reshape(member.axis_size, -1)
    picked = flat[places.reshape(-1)].reshape(*places.shape, -1)  # (blocks, repetitions, channels, rows)
    return picked.permute(0, 2, 1, 3).reshape(places.shape[0], dimension.size, -1)
