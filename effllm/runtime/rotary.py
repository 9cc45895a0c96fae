"""A proved rotary position embedding, and the tables by which keys are rotated to new positions.

A key at position p is stored as R(p) k, R block-diagonal with the angles p * omega. R(a) R(b) = R(a + b), so a key moves from
position s to p by R(p - s), whatever k was (PIE, arXiv 2407.03157). Angles are computed in fp64 and only their cosines are rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LAYOUTS = ("half", "interleaved")
CONSTANT = ("default", "linear", "llama3", "yarn", "per-channel")  # types whose frequencies never change
VARYING = ("dynamic", "longrope")  # types whose frequencies follow the length


@dataclass(frozen=True)
class Rotary:
    """What the recogniser proved about a model's rotary sites.

    `omega` holds the angles per position, fp64 (R / 2,); the first R of `head_dim` channels turn. `layout` "half" pairs channel c
    with c + R / 2, "interleaved" 2 c with 2 c + 1. `factor` multiplies cosine and sine in the model (YaRN's attention factor): keys
    in a cache hold it once already, so a move must not apply it again. `limit` is the first position that the model cannot encode,
    None where there is none. `source` names the buffer that holds the frequencies, if one does.
    """

    omega: Tensor
    layout: str
    head_dim: int
    factor: float = 1.0
    scaling: str = "default"
    limit: int | None = None
    source: str = ""

    @property
    def channels(self) -> int:
        """Channels that turn."""
        return 2 * self.omega.numel()

    @property
    def varies(self) -> bool:
        """Whether the frequencies follow the length, so that keys of different times disagree."""
        return self.scaling in VARYING

    def at(self, omega: Tensor) -> Rotary:
        """The same with other frequencies."""
        return replace(self, omega=omega)

    def same_turn(self, other: Rotary) -> bool:
        """Whether two sites turn keys alike."""
        shape = (self.layout, self.head_dim, self.omega.numel()) == (other.layout, other.head_dim, other.omega.numel())
        return shape and bool(torch.equal(self.omega, other.omega))


def turns(angles: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Cosines and sines (A, R / 2) of fp64 angles in the precision that keys of `dtype` are rotated in."""
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    return angles.double().cos().to(kind), angles.double().sin().to(kind)


def shift_angles(shifts: Tensor | Sequence[int], omega: Tensor) -> Tensor:
    """fp64 angles (A, R / 2) of moves by `shifts` positions at constant frequencies."""
    return torch.as_tensor(shifts, dtype=torch.float64, device=omega.device)[:, None] * omega.double()[None, :]


def change_angles(old: Tensor, new: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """fp64 angles (T, R / 2) that take keys from position `old` at frequencies `before` (T, R / 2) or (R / 2,) to `new` at `after`.

    The two-frequency rule p' w' - p w, for types whose frequencies follow the length; a shift alone would be wrong.
    """
    return new.double()[:, None] * after.double() - old.double()[:, None] * before.double()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """Turn the last dimension of x (..., D) by angles whose cos and sin (..., R / 2) broadcast against x[..., : R / 2].

    Computes in the precision of cos and sin and returns it; channels from R on pass.
    """
    half = cos.shape[-1]
    wide = x.to(cos.dtype)
    if layout == "half":
        a, b = wide[..., :half], wide[..., half : 2 * half]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, wide[..., 2 * half :]), -1)
    a, b = wide[..., 0 : 2 * half : 2], wide[..., 1 : 2 * half : 2]
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    return torch.cat((turned, wide[..., 2 * half :]), -1)
