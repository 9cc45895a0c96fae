"""N:M weights and ARMOR's core between wrappers as modules, see runtime/formats/{nm,armor}.py."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from effllm.lowering import nm_linear
from effllm.lowering.op import Problem
from effllm.runtime import layouts
from effllm.runtime.formats import armor, bipolar, dense, nm, parts
from effllm.runtime.formats.base import Packed
from effllm.runtime.weights.structured import Call, StructuredWeight


def _coded(core: Packed) -> bool:
    return bool(core.attrs["values"]["format"] == bipolar.name)


def _codes(core: Packed) -> tuple[int, int, float]:
    """bits, group and zero point of the kept values; zeros where they are floating point."""
    if not _coded(core):
        return 0, 0, 0.0
    about = core.attrs["values"]["attrs"]
    return about["bits"], about["group"], bipolar.zero_point(about["bits"], about["grid"], about["source_bits"])


def _problem(op: str, core: Packed, *, dtype: torch.dtype, device: str, m: int | None, block: int = 0) -> Problem:
    (n, k), a = core.shape, core.attrs
    values = None if _coded(core) else core.tensors["values.values"].dtype
    bits, group, _ = _codes(core)
    scale = core.tensors["values.scale"].dtype if _coded(core) else torch.float16
    coded: dict[str, Any] = {"bits": bits, "group": group, "affine": "values.minimum" in core.tensors, "scale_dtype": scale}
    return nm_linear.problem(op, n, k, a["n"], a["m"], m=m, dtype=dtype, device=device, values=values, block=block, **coded)


def _core(like: Packed, tensors: dict[str, Tensor], layout: str) -> Packed:
    """The N:M weight behind tensors of a layout, in the canonical one."""
    (n, k), keep, of = like.shape, like.attrs["n"], like.attrs["m"]
    found = layouts.get(layout)
    columns = found.columns(tensors["index"], n, k, keep, of, _coded(like))
    about = parts.part(like, "values")
    if not _coded(like):
        kept = found.values(tensors["values"], n, k, keep, of)[:n]
        return nm.make(dense.make(kept), columns[:n], k, keep, of)
    bits, group, _ = _codes(like)
    u, scale, low = found.codes(tensors["values"], tensors["scale"], tensors.get("minimum"), n=n, k=k, keep=keep, of=of, bits=bits, group=group)
    width, groups = bipolar.padded(about.shape[1], group), bipolar.groups(about.shape[1], group)
    own = {"planes": bipolar.pack_codes(u[:n, :width], bits), "scale": scale[:n, :groups].contiguous()}
    if low is not None:
        own["minimum"] = low[:n, :groups].contiguous()
    return nm.make(Packed(about.format, about.version, about.shape, own, about.attrs), columns[:n], k, keep, of)


class NMWeight(StructuredWeight):
    """At most n of every m neighbours along the input, values floating point or bipolar-INT."""

    format: ClassVar[str] = nm.name
    recovery_factors: ClassVar[tuple[str, ...]] = ("values",)

    @staticmethod
    def call(packed: Packed) -> Call:
        """The op for floating-point or for coded values."""
        (n, k), a = packed.shape, packed.attrs
        if _coded(packed):
            return Call("nm_bipolar_linear", ("values", "scale", "minimum", "index"), (n, k, a["n"], a["m"], *_codes(packed)))
        return Call("nm_linear", ("values", "index"), (n, k, a["n"], a["m"]))

    @staticmethod
    def problem(packed: Packed, *, act: str, dtype: torch.dtype, device: str, m: int | None = None) -> Problem:
        """The kernel problem that a linear with this weight poses."""
        return _problem("nm_bipolar_linear" if _coded(packed) else "nm_linear", packed, dtype=dtype, device=device, m=m)

    @classmethod
    def arrange(cls, packed: Packed, layout: str) -> dict[str, Tensor]:
        """Values and index in the kernel's layout."""
        return dict(layouts.get(layout).repack(packed))

    @classmethod
    def restore(cls, like: Packed, tensors: dict[str, Tensor], layout: str) -> Packed:
        """The inverse of `arrange`."""
        return _core(like, tensors, layout)

    @staticmethod
    def describe(packed: Packed) -> dict[str, Any]:
        """Pattern and precision."""
        return {"pattern": f"{packed.attrs['n']}:{packed.attrs['m']}", "bits": parts.precision(packed.attrs)}


class ArmorWeight(StructuredWeight):
    """A (S (B x)) with an N:M core S and block-diagonal A and B."""

    format: ClassVar[str] = armor.name
    recovery_factors: ClassVar[tuple[str, ...]] = ("values", "left", "right")

    @staticmethod
    def call(packed: Packed) -> Call:
        """The fused op."""
        core, (n, k) = parts.part(packed, "core"), packed.shape
        scalars = (n, k, core.attrs["n"], core.attrs["m"], *_codes(core))
        return Call("armor_linear", ("left", "values", "scale", "minimum", "index", "right"), scalars)

    @staticmethod
    def problem(packed: Packed, *, act: str, dtype: torch.dtype, device: str, m: int | None = None) -> Problem:
        """The kernel problem that a linear with this weight poses."""
        block = packed.tensors["left.values"].shape[1]
        return _problem("armor_linear", parts.part(packed, "core"), dtype=dtype, device=device, m=m, block=block)

    @classmethod
    def arrange(cls, packed: Packed, layout: str) -> dict[str, Tensor]:
        """Core and wrappers in the kernel's layout."""
        return dict(layouts.get(layout).repack(packed))

    @classmethod
    def restore(cls, like: Packed, tensors: dict[str, Tensor], layout: str) -> Packed:
        """The inverse of `arrange`; wrappers come back in the dtype of the layout."""
        found, block = layouts.get(layout), like.tensors["left.values"].shape[1]
        left, right = (found.wrapper(tensors[key]).reshape(-1, block) for key in ("left", "right"))
        return armor.make(_core(parts.part(like, "core"), tensors, layout), left, right)

    @staticmethod
    def describe(packed: Packed) -> dict[str, Any]:
        """Pattern, block size and precision of the core."""
        core = parts.part(packed, "core")
        block = packed.tensors["left.values"].shape[1]
        return {"pattern": f"{core.attrs['n']}:{core.attrs['m']}", "block": block, "bits": parts.precision(core.attrs)}


