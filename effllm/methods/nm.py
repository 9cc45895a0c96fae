"""N:M sparse weights: `nm(pattern=2:4, solver=wanda)`, `armor(pattern=2:4, block=64)`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from effllm.errors import RecipeError
from effllm.methods import base

SOLVERS = ("auto", "magnitude", "wanda", "sparsegpt", "dsnot")
GROUPS_OF = (4, 8, 16)
PERMUTE = ("none", "inner", "all")
RATIOS = ("uniform", "farms", "essential", "knee")


@dataclass(frozen=True)
class NM(base.Method):
    """Parameters of N:M sparsity: at most n of every m neighbours along the input are kept.

    name: "nm", or "armor" for the 2:4 (or n:m) core between two block-diagonal wrappers of size `block`. pattern: "n:m" with m of
    4, 8 or 16. solver: of nm; "auto" is sparsegpt with calibration and magnitude without. bits: of the kept values, 16 keeps them in
    the weight's dtype; group: their scale group, along the kept values. pad: whether K that is no multiple of m may be padded.

    permute: reorder channels across coupled layers first, where masks then keep more (`effllm.reordering`): "inner" (or true) within blocks, "all"
    the residual stream as well. ratios: how n is shared out over the model's blocks, the pattern being the mean (`effllm.solvers.nm.layerwise`).
    """

    names: ClassVar[tuple[str, ...]] = ("nm", "armor")

    name: str = "nm"
    pattern: str = "2:4"
    solver: str = "auto"
    bits: int = 16
    group: int = 32
    block: int = 64
    pad: bool = False
    permute: str = "none"
    ratios: str = "uniform"

    @property
    def method(self) -> str:
        """nm or armor."""
        return self.name

    @property
    def keep(self) -> int:
        """Values kept of each group."""
        return int(self.pattern.split(":")[0])

    @property
    def of_group(self) -> int:
        """Size of a group."""
        return int(self.pattern.split(":")[1])

    @property
    def calibrates(self) -> bool:
        """All but the magnitude mask."""
        return self.solver != "magnitude"

    @property
    def requires_calibration(self) -> bool:
        """All solvers but magnitude read activations."""
        return self.name == "armor" or self.solver not in ("auto", "magnitude") or self.permute != "none" or self.ratios == "knee"

    @property
    def needs_model(self) -> bool:
        """Permutations and layer-wise ratios look at all layers."""
        return self.permute != "none" or self.ratios != "uniform"

    @property
    def aims_at_dense(self) -> bool:
        """Where SparseGPT solves for values: the next layers can make up for a part. ARMOR fits a layer so well that aiming past it overfits."""
        return self.calibrates and self.name == "nm" and self.solver in ("auto", "sparsegpt")

    @property
    def label(self) -> str:
        """Pattern and solver."""
        return f"{self.name} {self.pattern}, {self.solver if self.name == 'nm' else f'block {self.block}'}{'' if self.bits == 16 else f', {self.bits} bits'}"

    @classmethod
    def prepare(cls, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Reads group=channel."""
        found = base.channel(values)
        if isinstance(found.get("permute"), bool):
            found["permute"] = "inner" if found["permute"] else "none"
        return found | {"name": name}

    def check(self) -> None:
        """Raise RecipeError where a value is out of range."""
        found = re.fullmatch(r"(\d+):(\d+)", str(self.pattern))
        if found is None or int(found[2]) not in GROUPS_OF or not 0 < int(found[1]) < int(found[2]):
            raise RecipeError("E-RCP-VALUE", f"pattern={self.pattern!r}", f"pattern is n:m with m of {GROUPS_OF} and n from 1 to m - 1, as in 2:4")
        base.one_of("solver", self.solver, SOLVERS)
        base.stored_bits(self.bits)
        base.group(self.group)
        base.whole("block", self.block, 2, 1 << 12)
        base.one_of("permute", self.permute, PERMUTE)
        base.one_of("ratios", self.ratios, RATIOS)
        base.one_of("pad", str(self.pad).lower(), ("true", "false"))
