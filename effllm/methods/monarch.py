"""Monarch weights: `monarch(ratio=0.5)`, two block-diagonal factors around a permutation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from effllm.methods import base

SOLVERS = ("auto", "project", "whitened", "descent")


@dataclass(frozen=True)
class Monarch(base.Method):
    """Parameters of the Monarch method.

    ratio: share of the parameters that stays; blocks: number of blocks on each side; form "contiguous" (permutation-free) or
    "strided" (the paper's). solver: "project" (data-free), "whitened", "descent" (block coordinate descent), or "auto" (descent where
    there is calibration, project otherwise). bits: of both factors, 16 keeps them in the weight's dtype. pad: whether sizes that the
    blocks do not divide may be padded.
    """

    names: ClassVar[tuple[str, ...]] = ("monarch",)

    ratio: float = 0.5
    blocks: int = 4
    form: str = "contiguous"
    solver: str = "auto"
    bits: int = 16
    group: int = 32
    pad: bool = True

    @property
    def calibrates(self) -> bool:
        """Unless the recipe asks for the data-free projection."""
        return self.solver != "project"

    @property
    def requires_calibration(self) -> bool:
        """Whitening and descent need statistics."""
        return self.solver in ("whitened", "descent")

    @property
    def aims_at_dense(self) -> bool:
        """Yes: what these leave of a layer is far from it, and the next layers can make up for a part."""
        return self.calibrates

    @property
    def label(self) -> str:
        """Size and blocks."""
        return f"monarch, {self.ratio:g} of the parameters, {self.blocks} blocks{'' if self.bits == 16 else f', {self.bits} bits'}"

    @classmethod
    def prepare(cls, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Reads group=channel."""
        return base.channel(values)

    def check(self) -> None:
        """Raise RecipeError where a value is out of range."""
        base.share("ratio", self.ratio)
        base.whole("blocks", self.blocks, 1, 1 << 12)
        base.one_of("form", self.form, ("contiguous", "strided"))
        base.one_of("solver", self.solver, SOLVERS)
        base.stored_bits(self.bits)
        base.group(self.group)
        base.one_of("pad", str(self.pad).lower(), ("true", "false"))
