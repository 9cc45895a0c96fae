"""Low-rank weights as modules: plain, with folded input channels, with pivots, with a sparse part; factors dense or bipolar-INT."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from effllm.errors import KernelError
from effllm.lowering import lowrank_bipolar_linear, lowrank_linear
from effllm.lowering.op import Problem
from effllm.runtime.formats import bipolar, dense, lowrank, parts, sltrain
from effllm.runtime.formats.base import Packed
from effllm.runtime.layouts import compose
from effllm.runtime.weights.structured import Call, StructuredWeight

_SIX = tuple(f"{part}_{name}" for part in ("a", "b") for name in ("codes", "scale", "minimum"))


def _formats(packed: Packed) -> tuple[str, str]:
    return packed.attrs["a"]["format"], packed.attrs["b"]["format"]


class LowRankWeight(StructuredWeight):
    """W = A B, see runtime/formats/lowrank.py."""

    format: ClassVar[str] = lowrank.name
    recovery_factors: ClassVar[tuple[str, ...]] = ("a", "b")

    @property
    def recovery_pair(self) -> tuple[str, str] | None:
        """The factors whose product is the weight (folded channels lie behind it in a); not codes, and not pivoted rows, which are both at once."""
        product = _formats(self._meta) == (dense.name, dense.name) and "pivots" not in self._meta.tensors
        return ("a", "b") if product else None

    def shrink(self, rank: int) -> None:
        """Keep the first `rank` columns of a and rows of b, and the columns of folded channels."""
        now = self.packed()
        a, b = (parts.part(now, key).tensors["values"] for key in ("a", "b"))
        a = torch.cat([a[:, :rank], a[:, b.shape[0] :]], 1)
        rest = {key: now.tensors.get(key) for key in ("shift", "channels")}
        self.hold(lowrank.make(dense.make(a), dense.make(b[:rank]), shape=now.shape, **rest))

    def hold(self, packed: Packed) -> None:
        """Another stored form in the place of this one, of the same shape."""
        self._install(packed)

    @staticmethod
    def call(packed: Packed) -> Call:
        """The op for dense or for bipolar factors. KernelError (E-KRN-FORM) for a mix of both, or for channels beside codes."""
        a, b = _formats(packed)
        if (a, b) == (dense.name, dense.name):
            return Call("lowrank_linear", ("a", "b", "channels", "pivots"))
        if (a, b) != (bipolar.name, bipolar.name) or "channels" in packed.tensors:
            raise KernelError("E-KRN-FORM", f"factors stored as {a} and {b}", "store both factors alike, and channels beside dense ones only")
        scalars: list[Any] = [packed.attrs["a"]["shape"][0], packed.attrs["rank"]]
        for part in ("a", "b"):
            about = packed.attrs[part]["attrs"]
            scalars += [about["bits"], about["group"], bipolar.zero_point(about["bits"], about["grid"], about["source_bits"])]
        return Call("lowrank_bipolar_linear", (*_SIX, "pivots"), tuple(scalars))

    @staticmethod
    def problem(packed: Packed, *, act: str, dtype: torch.dtype, device: str, m: int | None = None) -> Problem:
        """The kernel problem that a linear with this weight poses."""
        (n, k), rank = packed.shape, packed.attrs["rank"]
        pivoted = "pivots" in packed.tensors
        if _formats(packed)[0] == dense.name:
            channels = packed.tensors["channels"].numel() if "channels" in packed.tensors else 0
            factor = packed.tensors["a.values"].dtype
            return lowrank_linear.problem_of("lowrank_linear", n, k, rank, factor, m=m, dtype=dtype, device=device, channels=channels, pivoted=pivoted)
        a, b = (packed.attrs[part]["attrs"] for part in ("a", "b"))
        grids: dict[str, Any] = {"bits": a["bits"], "group": a["group"], "affine": "a.minimum" in packed.tensors}
        grids |= {"b_bits": b["bits"], "b_group": b["group"], "b_affine": "b.minimum" in packed.tensors}
        scale = packed.tensors["a.scale"].dtype
        about: dict[str, Any] = {"m": m, "dtype": dtype, "device": device, "scale_dtype": scale, "pivoted": pivoted}
        return lowrank_bipolar_linear.problem_of("lowrank_bipolar_linear", n, k, rank, **grids, **about)

    @classmethod
    def arrange(cls, packed: Packed, layout: str) -> dict[str, Tensor]:
        """Factors in the kernel's layout; channels as int64; `pivots` (N,) int64 says where each row of concat(B x, A B x) goes."""
        out = compose.arrange(packed, layout)
        out.pop("shift", None)
        if "channels" in out:
            out["channels"] = out["channels"].long()
        if "pivots" in out:
            first = out["pivots"].long()
            out["pivots"] = torch.cat([first, lowrank.rest(first, packed.shape[0])])
        return out

    @classmethod
    def restore(cls, like: Packed, tensors: dict[str, Tensor], layout: str) -> Packed:
        """The inverse of `arrange`."""
        own = dict(tensors)
        if own.get("pivots") is not None:
            own["pivots"] = own["pivots"][: like.attrs["rank"]].int()
        if own.get("channels") is not None:
            own["channels"] = own["channels"].int()
        return compose.restore(like, own, layout)

    @staticmethod
    def describe(packed: Packed) -> dict[str, Any]:
        """Rank, precision, and what there is beside the factors."""
        found: dict[str, Any] = {"rank": packed.attrs["rank"], "bits": parts.precision(packed.attrs)}
        if "channels" in packed.tensors:
            found["channels"] = packed.tensors["channels"].numel()
        return found | ({"pivoted": True} if "pivots" in packed.tensors else {})


class SparseLowRankWeight(StructuredWeight):
    """W = A B + S, see runtime/formats/sltrain.py."""

    format: ClassVar[str] = sltrain.name
    recovery_factors: ClassVar[tuple[str, ...]] = ("a", "b", "values")
    recovery_pair: ClassVar[tuple[str, str]] = ("a", "b")

    def shrink(self, rank: int) -> None:
        """Keep the first `rank` columns of a and rows of b."""
        now = self.packed()
        cut = {"a.values": now.tensors["a.values"][:, :rank].contiguous(), "b.values": now.tensors["b.values"][:rank].contiguous()}
        attrs: dict[str, Any] = {**now.attrs, "rank": rank}
        for key, shape in (("a", [now.shape[0], rank]), ("b", [rank, now.shape[1]])):
            attrs[key] = {**attrs[key], "shape": shape}
        self._install(Packed(now.format, now.version, now.shape, {**now.tensors, **cut}, attrs))

    @staticmethod
    def call(packed: Packed) -> Call:
        """The op for dense factors. KernelError (E-KRN-FORM) for quantized ones."""
        if _formats(packed) != (dense.name, dense.name):
            raise KernelError("E-KRN-FORM", "quantized factors beside a sparse part", "store the factors as floating point")
        return Call("sparse_lowrank_linear", ("a", "b", "values", "columns", "rows"))

    @staticmethod
    def problem(packed: Packed, *, act: str, dtype: torch.dtype, device: str, m: int | None = None) -> Problem:
        """The kernel problem that a linear with this weight poses."""
        (n, k), t = packed.shape, packed.tensors
        values = t["sparse.values"].numel()
        rank = packed.attrs["b"]["shape"][0]
        return lowrank_linear.problem_of("sparse_lowrank_linear", n, k, rank, t["a.values"].dtype, m=m, dtype=dtype, device=device, nonzeros=values)

    @classmethod
    def arrange(cls, packed: Packed, layout: str) -> dict[str, Tensor]:
        """Factors and S in CSR; columns as uint16 where they are stored in 16 bits."""
        out = {key: parts.part(packed, key).tensors["values"] for key in ("a", "b")}
        columns = packed.tensors["sparse.columns"]
        if columns.dtype == torch.int16:
            columns = (columns.int() + sltrain.BIAS).to(torch.uint16)
        return out | {"values": packed.tensors["sparse.values"], "columns": columns, "rows": packed.tensors["sparse.rows"]}

    @classmethod
    def restore(cls, like: Packed, tensors: dict[str, Tensor], layout: str) -> Packed:
        """The inverse of `arrange`."""
        columns = tensors["columns"]
        if columns.dtype == torch.uint16:
            columns = (columns.int() - sltrain.BIAS).to(torch.int16)
        back = {"a.values": tensors["a"], "b.values": tensors["b"]}
        back |= {"sparse.values": tensors["values"], "sparse.columns": columns, "sparse.rows": tensors["rows"]}
        return Packed(like.format, like.version, like.shape, {name: back[name] for name in like.tensors}, dict(like.attrs))

    @staticmethod
    def describe(packed: Packed) -> dict[str, Any]:
        """Rank and density."""
        n, k = packed.shape
        return {"rank": packed.attrs["b"]["shape"][0], "bits": 16, "density": round(packed.tensors["sparse.values"].numel() / (n * k), 4)}
