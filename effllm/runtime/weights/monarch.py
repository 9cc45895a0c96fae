"""Monarch weights as modules, see runtime/formats/monarch.py."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from effllm.lowering import monarch_linear
from effllm.lowering.op import Problem
from effllm.runtime import layouts
from effllm.runtime.formats import bipolar, dense, monarch, parts
from effllm.runtime.formats.base import Packed
from effllm.runtime.weights.structured import Call, StructuredWeight

_SIX = tuple(f"{name}{part}" for part in (1, 2) for name in ("codes", "scale", "minimum"))


def _dense(packed: Packed) -> bool:
    return bool(packed.attrs["w1"]["format"] == dense.name)


class MonarchWeight(StructuredWeight):
    """Two block-diagonal factors around a permutation, dense or bipolar-INT."""

    format: ClassVar[str] = monarch.name
    recovery_factors: ClassVar[tuple[str, ...]] = ("w1", "w2")

    @staticmethod
    def call(packed: Packed) -> Call:
        """The op for dense or for bipolar factors."""
        scalars = monarch_linear.scalars(packed)
        return Call("monarch_linear", ("w1", "w2"), scalars) if _dense(packed) else Call("monarch_bipolar_linear", _SIX, scalars)

    @staticmethod
    def problem(packed: Packed, *, act: str, dtype: torch.dtype, device: str, m: int | None = None) -> Problem:
        """The kernel problem that a linear with this weight poses."""
        return monarch_linear.problem_of(packed, dtype, device, m)

    @classmethod
    def arrange(cls, packed: Packed, layout: str) -> dict[str, Tensor]:
        """The op's tensors by name; codes are laid out block by block."""
        names = ("w1", "w2") if _dense(packed) else _SIX
        found = zip(names, monarch_linear.operands(packed, layout), strict=True)
        return {name: t for name, t in found if t is not None}

    @classmethod
    def restore(cls, like: Packed, tensors: dict[str, Tensor], layout: str) -> Packed:
        """The inverse of `arrange`."""
        if _dense(like):
            back = {"w1.values": tensors["w1"], "w2.values": tensors["w2"]}
            return Packed(like.format, like.version, like.shape, back, dict(like.attrs))
        factors = {}
        for key, i, blocks in (("w1", 1, like.attrs["blocks_in"]), ("w2", 2, like.attrs["blocks_out"])):
            own = {name: t for name in ("codes", "scale", "minimum") if (t := tensors.get(f"{name}{i}")) is not None}
            factors[key] = _rows(parts.part(like, key), own, blocks, layout)
        attrs = {k: v for k, v in like.attrs.items() if k not in factors}
        return parts.join(like.format, like.version, like.shape, factors, attrs=attrs)

    @staticmethod
    def describe(packed: Packed) -> dict[str, Any]:
        """Blocks, block rank and precision."""
        a = packed.attrs
        return {"blocks": f"{a['blocks_out']}x{a['blocks_in']}", "rank": a["rank"], "strided": a["strided"], "bits": parts.precision(a)}


def _rows(like: Packed, tensors: dict[str, Tensor], blocks: int, layout: str) -> Packed:
    """A bipolar factor out of a layout whose blocks of rows lie one after another."""
    module = layouts.get(layout)
    if layout == "planes":
        return module.restore(tensors, like.shape, like.attrs)  # type: ignore[no-any-return]
    rows = like.shape[0] // blocks
    cut = {name: t.chunk(blocks) for name, t in tensors.items()}
    made = [module.restore({name: c[b] for name, c in cut.items()}, (rows, like.shape[1]), like.attrs) for b in range(blocks)]
    joined = {name: torch.cat([m.tensors[name] for m in made], 1 if name == "planes" else 0) for name in made[0].tensors}
    return Packed(bipolar.name, bipolar.version, like.shape, joined, dict(like.attrs))
