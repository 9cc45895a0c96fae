"""Activation sparsity: `act:chess(sparsity=0.5)`, teal, rsparse, cats. Not a way to pack a weight, so not one of METHODS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from effllm.errors import RecipeError, nearest
from effllm.methods import base

ALLOCATIONS = ("greedy", "measured", "uniform")
LAYERS = ("uniform", "measured")


@dataclass(frozen=True)
class Activation:
    """Which activations are skipped, and how many.

    name: chess and cats drop channels of gated MLPs by the activated gate; teal and rsparse drop inputs of every projection of the
    blocks. sparsity: for teal and rsparse the share of the blocks' weights that a token does not read; for chess and cats the share of
    gate channels (and of the inputs that `attention` adds), pooled over tokens. rows: calls of more rows are dense.
    settle: rounds in which thresholds move to what the sparse model's own activations need for the share (0: those of the dense model).
    layers: whether all blocks have the same share, or one by what each alone costs the model's output, with the same mean.
    attention: chess: whether inputs of the query and output projections are dropped too; weigh: whether
    what is dropped also counts by the norm of its column of the weight that would multiply it. allocation: of teal and rsparse, shares per
    projection by what each alone costs the model's output ("measured"; `layers` adds nothing to it), by TEAL's greedy search over block outputs, in steps
    of `step`, or the same for all. tokens: of each search; budget and seed: of rsparse's
    search for the split between columns and low rank, in evaluations per block.
    """

    names: ClassVar[tuple[str, ...]] = ("chess", "rsparse", "teal", "cats")
    _OWN: ClassVar[dict[str, tuple[str, ...]]] = {
        "chess": ("attention", "weigh"), "cats": (), "teal": ("allocation", "step", "tokens"), "rsparse": ("allocation", "step", "tokens", "budget", "seed"),
    }  # fmt: skip

    name: str = "chess"
    sparsity: float = 0.5
    rows: int = 4
    settle: int = 2
    layers: str = "uniform"
    attention: bool = True
    weigh: bool = False
    allocation: str = "measured"
    step: float = 0.1
    tokens: int = 512
    budget: int = 48
    seed: int = 0

    @classmethod
    def settings(cls, name: str) -> tuple[str, ...]:
        """What a recipe may set for a method."""
        return ("sparsity", "rows", "settle", "layers", *cls._OWN[name])

    @classmethod
    def of(cls, name: str, values: Mapping[str, Any]) -> Activation:
        """Checked parameters from a recipe's keys. Raises RecipeError."""
        if name not in cls.names:
            raise RecipeError("E-RCP-METHOD", f"unknown method {name!r}", nearest(name, cls.names))
        for key in values:
            if key not in cls.settings(name):
                raise RecipeError("E-RCP-KEY", f"unknown {name} key {key!r}", nearest(str(key), cls.settings(name)))
        made = cls(name=name, **values)
        made.check()
        return replace(made, sparsity=float(made.sparsity))

    def check(self) -> None:
        """Raise RecipeError where a value is out of range."""
        s = self.sparsity
        if not isinstance(s, int | float) or isinstance(s, bool) or not 0 <= s < 1:
            raise RecipeError("E-RCP-VALUE", f"sparsity={s!r}", "sparsity is a number from 0 to below 1")
        base.whole("rows", self.rows, 0, 4)
        base.whole("settle", self.settle, 0, 16)
        base.one_of("layers", self.layers, LAYERS)
        base.one_of("allocation", self.allocation, ALLOCATIONS)
        for key in ("attention", "weigh"):
            if not isinstance(getattr(self, key), bool):
                raise RecipeError("E-RCP-VALUE", f"{key}={getattr(self, key)!r}", f"{key} is true or false")
        base.share("step", self.step)
        base.whole("tokens", self.tokens, 1, 1 << 20)
        base.whole("budget", self.budget, 1, 1 << 20)
        base.whole("seed", self.seed, 0, 1 << 62)

    @property
    def gated(self) -> bool:
        """Whether gates decide, not inputs."""
        return self.name in ("chess", "cats")

    @property
    def compares(self) -> bool:
        """Whether shares come from what the model's output loses."""
        return self.sparsity > 0 and (self.layers == "measured" or (not self.gated and self.allocation == "measured"))

    def to_dict(self) -> dict[str, Any]:
        """The method and what a recipe would set."""
        return {"method": self.name} | {key: value for key, value in asdict(self).items() if key in self.settings(self.name)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Activation:
        """The inverse of `to_dict`. Raises RecipeError."""
        rest = dict(values)
        return cls.of(str(rest.pop("method", None)), rest)

    @property
    def label(self) -> str:
        """A few words for a table."""
        return f"{self.name} {self.sparsity:.0%}"
