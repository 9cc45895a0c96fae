"""bipolar-INT weights: `bipolar(bits=4)`, or w4, w4a8, w8 for short."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from effllm.errors import RecipeError
from effllm.methods import base

OFFSETS = ("auto", "none", "integer", "affine")
SOLVERS = ("auto", "search", "gptq")
ACTS = ("a16", "a8")
_OFFSET_OF = {"symmetric": "none", "integer": "integer", "affine": "affine"}


@dataclass(frozen=True)
class Bipolar(base.Method):
    """Parameters of the bipolar method.

    bits 1..8; group 16/32/64/128 or 0 (per channel, also written "channel"); offset: "none" (symmetric mid-rise grid),
    "integer" (two's-complement grid), "affine" (own offset per group) or "auto" (affine only where it pays for its bytes);
    act "a16" or "a8"; solver "search" (data-free), "gptq" (needs calibration) or "auto" (gptq when there is calibration);
    pad: whether K that is no multiple of the group may be padded.
    """

    names: ClassVar[tuple[str, ...]] = ("bipolar",)

    bits: int = 4
    group: int = 32
    offset: str = "auto"
    act: str = "a16"  # type: ignore[misc]
    solver: str = "auto"
    pad: bool = True

    @property
    def calibrates(self) -> bool:
        """Unless the recipe asks for the data-free search."""
        return self.solver != "search"

    @property
    def requires_calibration(self) -> bool:
        """Where the recipe asks for gptq."""
        return self.solver == "gptq"

    @property
    def label(self) -> str:
        """Bits and activations."""
        return f"{self.bits}-bit {self.act}"

    @classmethod
    def prepare(cls, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Reads group=channel."""
        return base.channel(values)

    def check(self) -> None:
        """Raise RecipeError where a value is out of range."""
        base.bits(self.bits)
        base.group(self.group)
        for key, valid in (("offset", OFFSETS), ("solver", SOLVERS), ("act", ACTS)):
            base.one_of(key, getattr(self, key), valid)
        if not isinstance(self.pad, bool):
            raise RecipeError("E-RCP-VALUE", f"pad={self.pad!r}", "pad is true or false")

    def resolved(self, attrs: Mapping[str, Any]) -> Bipolar:
        """With the offset that "auto" came to."""
        return replace(self, offset=_OFFSET_OF[attrs["grid"]])

    def stored_as(self) -> Bipolar:
        """Without act and solver."""
        return replace(self, act="a16", solver="auto")
