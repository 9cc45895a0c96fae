"""Fits omega, layout and factor to what a slice of a graph does to vectors, and checks them at many positions in fp64.

The slice is linear in the content (rope_flow.py has seen to that), so that agreement on random vectors at a position is agreement there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from effllm.passes.rope_flow import Refused

Apply = Callable[[Tensor], tuple[Tensor, Tensor]]  # positions (n,) -> content x and its rotation y, both fp64 (n, rows, D)
FURTHEST = 1 << 20
_EXACT, _TABLE = 1e-12, 4.0  # relative error per position in fp64; multiples of the storage's epsilon


@dataclass(frozen=True)
class Fit:
    """omega (R / 2,) fp64; `varies`: other frequencies at other lengths; `limit`: the first position that fails."""

    omega: Tensor
    layout: str
    factor: float
    limit: int | None
    varies: bool


def fit(apply: Apply, block: int, epsilon: float) -> Fit:
    """The rotation that `apply` is, `block` positions a call; `epsilon` is that of the dtype in which its tables are stored.

    Raises Refused where it is none.
    """
    near = torch.arange(block)
    x, y = apply(near)
    reasons = []
    for layout, width in _candidates(x, y):
        try:
            phase, factor = _phases(x, y, layout, width)
        except Refused as error:
            reasons.append(f"{layout}: {error.reason}")
            continue
        return _checked(apply, block, epsilon, layout, width, phase, factor)
    raise Refused("no-rotation", "; ".join(reasons) or "positions change no channel")


def _candidates(x: Tensor, y: Tensor) -> Iterator[tuple[str, int]]:
    """Layouts and widths to try: the channels that change, and all of them (some frequencies may be 0)."""
    scale = x.abs().amax()
    moved = int(((y - y[:1] / x[:1] * x).abs().amax((0, 1)) > 1e-11 * scale).sum())
    for width in dict.fromkeys((moved + moved % 2, x.shape[-1] - x.shape[-1] % 2)):
        if width:
            yield "half", width
            yield "interleaved", width


def _pairs(x: Tensor, layout: str, width: int) -> Tensor:
    if layout == "half":
        return torch.complex(x[..., : width // 2], x[..., width // 2 : width])
    return torch.complex(x[..., 0:width:2], x[..., 1:width:2])


def _phases(x: Tensor, y: Tensor, layout: str, width: int) -> tuple[Tensor, float]:
    """Turns (n, R / 2), complex of length 1, and the common factor; Refused where rows or channels disagree."""
    turn = _pairs(y, layout, width) / _pairs(x, layout, width)
    if (turn - turn[:, :1]).abs().amax() > 1e-9 * turn.abs().amax():
        raise Refused("rows", "heads or vectors turn differently")
    if width < x.shape[-1] and (y[..., width:] - x[..., width:]).abs().amax() > 1e-9 * x.abs().amax():
        raise Refused("rest", f"channels from {width} on change too")
    turn = turn[:, 0]
    factor = float(turn.abs().mean())
    if not factor > 0:
        raise Refused("zero", "the result is zero")
    return turn / factor, factor


def _checked(apply: Apply, block: int, epsilon: float, layout: str, width: int, phase: Tensor, factor: float) -> Fit:
    omega = phase[1].angle()
    error = (phase - _unit(torch.arange(block), omega)).abs().amax()
    stored = bool(error > _EXACT * block)
    if stored:  # cosines come rounded from a table: the angle of one position is only as good, so reach further step by step
        if error > 2 * _TABLE * epsilon * block:
            raise Refused("angles", f"angles are not proportional to the position (error {float(error):.2g})")
        omega = _refine(phase, omega, torch.arange(block))
    limit = _limit(apply, block)
    varies = False
    for positions in _blocks(block, limit, every=stored):
        turn, again = _phases(*apply(positions), layout, width)
        if stored:
            omega = _refine(turn, omega, positions)
        bound = (_TABLE * epsilon if stored else _EXACT) * (1 + float(positions.max()))
        off = (turn - _unit(positions, omega)).abs().amax() > bound or abs(again - factor) > max(bound, 1e-9) * factor
        if off and stored:
            raise Refused("angles", f"the table's angles are not proportional to the position near {int(positions.max())}")
        if off:
            varies = True
            _check_alone(apply, positions, layout, width, factor)
        elif not stored and not varies:
            omega = _refine(turn, omega, positions)
    return Fit(omega, layout, factor, limit, varies)


def _check_alone(apply: Apply, positions: Tensor, layout: str, width: int, factor: float) -> None:
    """At one length the angles are proportional to the position, whatever they are at others."""
    mixed = torch.cat((torch.arange(len(positions) - 1), positions.amax()[None]))
    turn, again = _phases(*apply(mixed), layout, width)
    off = (turn - _unit(mixed, turn[1].angle())).abs().amax() > _EXACT * (1 + float(mixed.max()))
    if off or abs(again - factor) > 1e-9 * factor:
        raise Refused("angles", f"angles are not proportional to the position in a text of {int(positions.max()) + 1} tokens")


def _unit(positions: Tensor, omega: Tensor) -> Tensor:
    angles = positions.double()[:, None] * omega
    return torch.complex(angles.cos(), angles.sin())


def _refine(turn: Tensor, omega: Tensor, positions: Tensor) -> Tensor:
    """omega corrected by the phase error at the furthest position, where it counts most."""
    at = int(positions.argmax())
    if positions[at] == 0:
        return omega
    left = (turn[at] * _unit(positions[at : at + 1], omega)[0].conj()).angle()
    return omega + left / float(positions[at])


def _limit(apply: Apply, block: int) -> int | None:
    """The first position that raises; None where the furthest one works."""

    def works(position: int) -> bool:
        try:
            apply(torch.full((block,), position))
        except (IndexError, RuntimeError):
            return False
        return True

    if works(FURTHEST):
        return None
    low, high = 0, FURTHEST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if works(middle) else (low, middle)
    return high


def _blocks(block: int, limit: int | None, *, every: bool) -> Iterator[Tensor]:
    """Positions to check: all of a table, in order; else a spread over all magnitudes."""
    if every:
        if limit is None:
            raise Refused("angles", "cosines are rounded, and no table says to where")
        for start in range(0, limit, block):
            first = max(0, min(start, limit - block))
            yield torch.arange(first, first + block)
        return
    g = torch.Generator().manual_seed(0)
    for power in range(7, int(math.log2(FURTHEST)) + 1, 2):
        yield torch.randint(0, min(1 << power, limit or FURTHEST), (block,), generator=g)
