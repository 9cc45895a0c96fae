"""One way to run a linear on a GPU: the kernel and its tile sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

KINDS = ("gemv", "gemm", "dense")


@dataclass(frozen=True)
class Tiles:
    """`bm` is the rows of a tile (GEMV: 1, 2 or 4); kind "dense" unpacks and calls the vendor's product, and ignores the rest."""

    kind: str
    bm: int = 1
    bn: int = 64
    bk: int = 64
    split: int = 1
    warps: int = 4
    stages: int = 1

    @staticmethod
    def of(config: Mapping[str, Any]) -> Tiles:
        """From a configuration as stores and tuners hold it. Raises TypeError for another set of fields."""
        return Tiles(**config)

    def config(self) -> dict[str, Any]:
        """As stores and tuners hold it."""
        return asdict(self)


NAMES = frozenset(f.name for f in fields(Tiles))
