"""A coupled dimension: which places of which parameters are permuted together, and what a permutation must respect."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from effllm.errors import CouplingError


@dataclass(frozen=True)
class Loop:
    """Another factor of a member's axis: `size` repetitions `stride` places apart. `block` numbers the factor of `Structure.blocks` it is, if any."""

    size: int
    stride: int
    block: int | None = None


@dataclass(frozen=True)
class Member:
    """One occurrence of a dimension on a parameter's axis: channel c sits at `offset + c * stride`, plus what the loops add.

    `summed` says that a matrix product sums over this axis, so the parameter consumes the dimension.
    """

    parameter: str
    axis: int
    axis_size: int
    offset: int
    stride: int
    loops: tuple[Loop, ...] = ()
    summed: bool = False

    def places(self, size: int, blocks: tuple[int, ...]) -> Tensor:
        """Places on the axis, (blocks, repetitions, size) int64."""
        block = torch.zeros((1, 1), dtype=torch.int64)
        for number, count in enumerate(blocks):
            stride = next((loop.stride for loop in self.loops if loop.block == number), None)
            assert stride is not None, "every member knows every block"
            block = (block[:, :, None] + (torch.arange(count) * stride)[None, None]).reshape(-1, 1)
        copies = torch.zeros(1, dtype=torch.int64)
        for loop in self.loops:
            if loop.block is None:
                copies = (copies[:, None] + torch.arange(loop.size) * loop.stride).reshape(-1)
        channels = self.offset + torch.arange(size) * self.stride
        return block[:, :, None] + copies[None, :, None] + channels[None, None, :]


@dataclass(frozen=True)
class Structure:
    """What a permutation of a dimension looks like.

    `size` channels are reordered; with `blocks` (such as the number of KV heads) every block may have an order of its own. `unit` is how many
    consecutive places of an axis move as one (whole heads), `occurrences` how often one axis holds the dimension: 2 for gate | up and for rotary
    pairs (i, i + d/2), 3 for the heads of q | k | v.
    """

    size: int
    blocks: tuple[int, ...] = ()
    unit: int = 1
    occurrences: int = 1
    rotary: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a full permutation: (*blocks, size)."""
        return (*self.blocks, self.size)

    def __str__(self) -> str:
        what = "rotary pairs" if self.rotary else f"whole blocks of {self.unit}" if self.unit > 1 else "free"
        within = f" within each of {'x'.join(map(str, self.blocks))}" if self.blocks else ""
        return what + within

    def check(self, permutation: Tensor) -> Tensor:
        """The permutation as (number of blocks, size) int64; one row serves all blocks. Raises CouplingError."""
        p = torch.as_tensor(permutation).detach().cpu()
        if tuple(p.shape) not in ((self.size,), self.shape):
            cause = f"a permutation of shape {tuple(p.shape)} for a dimension of {self.size} channels ({self})"
            raise CouplingError("E-CPL-SIZE", cause, f"its shape is ({self.size},)" + (f" or {self.shape}" if self.blocks else ""))
        if p.is_floating_point() or p.dtype == torch.bool or p.is_complex():
            raise CouplingError("E-CPL-PERMUTATION", f"a permutation of dtype {p.dtype}", "channel numbers are integers, such as torch.randperm gives")
        rows = p.to(torch.int64).reshape(-1, self.size).expand(prod(self.blocks), self.size)
        if not bool((rows.sort(1).values == torch.arange(self.size)).all()):
            cause = f"not a permutation: each of 0..{self.size - 1} has to come once" + (" in every block" if self.blocks else "")
            raise CouplingError("E-CPL-PERMUTATION", cause, "new channel i is old channel permutation[i]")
        return rows


@dataclass(frozen=True)
class Dimension:
    """Channels that flow from parameter to parameter. `pinned` holds reasons why no permutation is allowed; `volatile` members are in no checkpoint."""

    index: int
    structure: Structure
    members: tuple[Member, ...]
    pinned: tuple[str, ...] = ()
    volatile: tuple[str, ...] = ()
    names: dict[str, tuple[str, ...]] = field(default_factory=dict, compare=False)  # every name of a member's tensor, tied ones included

    @property
    def size(self) -> int:
        """Number of channels (per block)."""
        return self.structure.size

    @property
    def consumers(self) -> tuple[Member, ...]:
        """Members over which a matrix product sums: the inputs of linear layers."""
        return tuple(m for m in self.members if m.summed)

    def random(self, generator: torch.Generator | None = None) -> Tensor:
        """A random legal permutation, shape `structure.shape`."""
        rows = [torch.randperm(self.size, generator=generator) for _ in range(prod(self.structure.blocks))]
        return torch.stack(rows).reshape(self.structure.shape)


def inverse(permutation: Tensor) -> Tensor:
    """The permutation that undoes one, along the last axis."""
    return torch.argsort(permutation, dim=-1)
