"""Low-rank weights W = A B, and sparse + low-rank W = A B + S: `whitened(ratio=0.8)`, `sltrain(ratio=0.6, density=0.03, bits=8)`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from effllm.errors import RecipeError
from effllm.methods import base

ALLOCATIONS = ("auto", "uniform", "energy", "welore", "sensitivity")
DATA_FREE = ("svd", "welore")


@dataclass(frozen=True)
class LowRank(base.Method):
    """Parameters of the low-rank family.

    name: the solver, one of `names`. ratio: share of the covered weights' parameters that stays (sparse part included);
    rank: instead of the ratio, one rank for every weight. allocation of the ranks: "uniform" (one ratio for all),
    "energy" (squared singular values), "welore" (one threshold over normalized singular values), "sensitivity" (measured KL) or
    "auto": energy for whitened and afm, where the gradients make the losses of all layers comparable, else uniform.
    pivoted: rows of the weight serve as one factor, which stores rank^2 numbers less.
    metric of errors at a layer's output: "plain", "fisher" (weighed by the loss's gradients there, whitened and afm) or "auto" (fisher
    where the allocation compares layers).
    bits: of both factors, 16 keeps them in the weight's dtype; group: their scale group. align: ranks are multiples of it.
    statistics: of the calibration data as the "dense" model sees them, or "sequential", behind the layers that are packed already and aimed at the
    dense model's outputs; "auto": dense where ranks are shared out by energy, which measured better there, else sequential.
    density: share of sparse values (sltrain) or of whole input channels (lost) besides the low-rank part.
    """

    names: ClassVar[tuple[str, ...]] = ("whitened", "svd", "fwsvd", "asvd", "afm", "welore", "sltrain", "lost")

    name: str = "whitened"
    ratio: float = 0.8
    rank: int | None = None
    allocation: str = "auto"
    bits: int = 16
    group: int = 32
    align: int = 1
    pivoted: bool = True
    metric: str = "auto"
    statistics: str = "auto"
    density: float = 0.02

    @property
    def method(self) -> str:
        """The solver."""
        return self.name

    @property
    def requires_calibration(self) -> bool:
        """Only the plain SVD looks at weights alone."""
        return self.name not in DATA_FREE or self.shared in ("energy", "sensitivity")

    @property
    def shared(self) -> str:
        """How ranks are allocated, "auto" resolved; one rank given is uniform."""
        if self.allocation != "auto":
            return self.allocation
        return "energy" if self.name in ("whitened", "afm") and self.rank is None else "uniform"

    @property
    def weighs_outputs(self) -> bool:
        """Whether the gradients at the layers' outputs are read."""
        if self.name not in ("whitened", "afm"):
            return False
        return self.metric == "fisher" or (self.metric == "auto" and self.shared == "energy")

    @property
    def needs_model(self) -> bool:
        """For gradients, and for ranks that are shared out over layers."""
        return self.shared != "uniform" or self.name == "fwsvd" or self.weighs_outputs

    @property
    def aims_at_dense(self) -> bool:
        """With sequential statistics: what these leave of a layer is far from it, and the next layers can make up for a part."""
        return self.calibrates and not self.reads_dense

    @property
    def reads_dense(self) -> bool:
        """Whether the calibration data are those of the dense model."""
        return self.statistics == "dense" or (self.statistics == "auto" and self.shared == "energy")

    @property
    def label(self) -> str:
        """Solver, size and precision."""
        size = f"rank {self.rank}" if self.rank else f"{self.ratio:g} of the parameters"
        return f"{self.name}, {size}{'' if self.bits == 16 else f', {self.bits} bits'}"

    @classmethod
    def prepare(cls, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """`welore(...)` is the plain SVD with its own allocation."""
        own = {"allocation": "welore"} if name == "welore" else {}
        return own | base.channel(values) | {"name": name}

    def check(self) -> None:
        """Raise RecipeError where a value is out of range."""
        base.one_of("method", self.name, self.names)
        base.share("ratio", self.ratio)
        if self.rank is not None:
            base.whole("rank", self.rank, 1, 1 << 24)
        base.whole("align", self.align, 1, 1 << 12)
        base.one_of("pivoted", str(self.pivoted).lower(), ("true", "false"))
        base.one_of("metric", self.metric, ("auto", "plain", "fisher"))
        base.one_of("statistics", self.statistics, ("auto", "dense", "sequential"))
        if self.bits != 16 and self.name in ("sltrain", "lost"):
            raise RecipeError("E-RCP-VALUE", f"{self.name} with bits={self.bits}", "quantized factors have no sparse part; leave bits out, or use whitened")
        base.one_of("allocation", self.allocation, ALLOCATIONS)
        base.stored_bits(self.bits)
        base.group(self.group)
        base.share("density", self.density, one=False)
