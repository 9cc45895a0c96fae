"""Pivoted low-rank weights while ranks are truncated or dropped: as plain factors, and pivoted again afterwards.

A pivoted weight stores r of its own rows as B. Its ranks have no order and cannot be dropped one by one, since each is an output row, so
TRP and ordered dropout work on W = [I; A] B, the same values with r^2 numbers more: meanwhile, in memory alone. What is left at the end
is pivoted on rows of its own, exactly but for the rounding to the factors' dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from effllm.runtime.formats import dense, lowrank, parts
from effllm.runtime.formats.base import Packed
from effllm.solvers.lowrank.factors import Factors
from effllm.solvers.lowrank.pivots import pivoted


class Holder(Protocol):
    """What is asked of a module with a stored low-rank weight; its layer of the package is above this one."""

    attrs: dict[str, Any]

    def canonical(self) -> Packed:
        """The weight's shapes, dtypes and attributes, on the meta device."""

    def packed(self) -> Packed:
        """The weight."""

    def hold(self, packed: Packed) -> None:
        """Another form of it in its place."""


def is_holder(module: Any) -> TypeGuard[Holder]:
    """Whether a module stores a low-rank weight that can change its form."""
    return getattr(type(module), "format", None) == lowrank.name and hasattr(module, "hold")


@contextmanager
def plain_forms(model: nn.Module) -> Iterator[int]:
    """Pivoted weights with floating-point factors are plain inside of the context; yields how many there are.

    Those that did not change come back bit for bit, also after an error.
    """
    found = [m for m in model.modules() if is_holder(m) and "pivots" in m.canonical().tensors and not _codes(m)]
    kept = []
    for module in found:
        old = module.packed()
        new = unfolded(old)
        # a copy: what is held may be changed in place, and both old and new must stay what they are
        module.hold(Packed(new.format, new.version, new.shape, {k: t.clone() for k, t in new.tensors.items()}, new.attrs))
        kept.append((module, old, new))
    try:
        yield len(found)
    finally:
        for module, old, new in kept:
            now = module.packed()
            same = now.attrs["rank"] == new.attrs["rank"] and all(torch.equal(now.tensors[k], new.tensors[k]) for k in ("a.values", "b.values"))
            module.hold(old if same else folded(now))


def unfolded(packed: Packed) -> Packed:
    """A pivoted weight in plain form: rows of the identity where the rows of B are outputs."""
    (n, _), rank = packed.shape, packed.attrs["rank"]
    a, b = _factors(packed)
    pivots = packed.tensors["pivots"].long()
    left = a.new_zeros(n, rank)
    left[pivots] = torch.eye(rank, dtype=a.dtype, device=a.device)
    left[lowrank.rest(pivots, n)] = a
    return lowrank.make(dense.make(left), dense.make(b), shape=packed.shape, shift=packed.tensors.get("shift"))


def folded(packed: Packed) -> Packed:
    """A plain weight in pivoted form. Directions that are zero are left out; where every row is a pivot the plain form stays."""
    a, b = _factors(packed)
    found = pivoted(Factors(packed.shape, a.detach(), b.detach(), packed.tensors.get("shift")))
    if found.pivots is None or found.rank >= packed.shape[0]:
        return packed
    stored = (dense.make(t.to(a.dtype).contiguous()) for t in (found.a, found.b))
    return lowrank.make(*stored, shape=packed.shape, shift=found.shift, pivots=found.pivots)


def quantized(model: nn.Module) -> list[str]:
    """Names of low-rank weights whose factors are integer codes: nothing of them can be trained, truncated or dropped."""
    return [name for name, m in model.named_modules() if is_holder(m) and _codes(m)]


def _codes(module: Holder) -> bool:
    return any(module.attrs[key]["format"] != dense.name for key in ("a", "b"))


def _factors(packed: Packed) -> tuple[Tensor, Tensor]:
    a, b = (parts.part(packed, key).tensors["values"] for key in ("a", "b"))
    return a, b
