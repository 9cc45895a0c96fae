"""Weights some of whose products are skipped, as modules: see runtime/formats/thresholded.py."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from effllm.errors import KernelError
from effllm.lowering import sparse_bipolar_linear as _coded_ops  # noqa: F401  defines the ops
from effllm.lowering import sparse_linear as ops
from effllm.lowering import sparsify
from effllm.lowering.op import Problem, Provider
from effllm.runtime import layouts
from effllm.runtime.formats import bipolar, parts, thresholded
from effllm.runtime.formats.base import Packed
from effllm.runtime.weights.structured import Call, StructuredWeight

_CODED = ("codes", "scale", "minimum")
_OWN = ("threshold", "colnorm", "u", "v")


def op_of(packed: Packed) -> str:
    """The op that serves a stored weight, its low-rank branch apart where codes and factors meet."""
    coded = packed.attrs["weight"]["format"] == bipolar.name
    if packed.attrs["side"] == "out":
        return "sparse_up_bipolar_linear" if coded else "sparse_up_linear"
    if coded:
        return "sparse_bipolar_linear"
    return "rsparse_linear" if "u" in packed.tensors else "sparse_linear"


class ThresholdedWeight(StructuredWeight):
    """A weight with thresholds on its inputs, or (side "out") one whose outputs a gate multiplies.

    By itself a weight of side "out" computes all outputs; where a graph shows the gate, `sparse_gate` joins the two.
    """

    format: ClassVar[str] = thresholded.name

    @staticmethod
    def call(packed: Packed) -> Call:
        """The op with the weight's limit of rows."""
        op, limit, (n, _) = op_of(packed), packed.attrs["limit"], packed.shape
        first = ("gate", "threshold") if packed.attrs["side"] == "out" else ("threshold",)
        if packed.attrs["weight"]["format"] != bipolar.name:
            names = {"sparse_linear": ("weight_t",), "rsparse_linear": ("colnorm", "weight_t", "u", "v"), "sparse_up_linear": ("weight",)}[op]
            return Call(op, (*first, *names), (limit,))
        a = packed.attrs["weight"]["attrs"]
        grid = (a["bits"], a["group"], bipolar.zero_point(a["bits"], a["grid"], a["source_bits"]))
        return Call(op, (*first, *_CODED), (*((n,) if op == "sparse_bipolar_linear" else ()), *grid, limit))

    @staticmethod
    def problem(packed: Packed, *, act: str, dtype: torch.dtype, device: str, m: int | None = None) -> Problem:
        """The kernel problem that a linear with this weight poses."""
        (n, k), a, t = packed.shape, packed.attrs, packed.tensors
        about: dict[str, Any] = {"m": m, "dtype": dtype, "device": device, "limit": a["limit"], "density": round(1 - a["realised"], 2)}
        if a["weight"]["format"] == bipolar.name:
            own = a["weight"]["attrs"]
            about |= {"bits": own["bits"], "group": own["group"], "affine": "weight.minimum" in t, "scale_dtype": t["weight.scale"].dtype}
        else:
            about |= {"values": t["weight.values"].dtype, "rank": t["u"].shape[1] if "u" in t else 0}
        return ops.problem(op_of(packed), n, k, **about)

    @classmethod
    def optional(cls, packed: Packed) -> tuple[str, ...]:
        """Every tensor that the op may take; factors beside codes are multiplied apart."""
        return tuple(dict.fromkeys((*cls.call(packed).tensors, *_OWN)))

    @classmethod
    def arrange(cls, packed: Packed, layout: str) -> dict[str, Tensor]:
        """The weight by input channel (side "in") or by output row, thresholds, and what stands for a gate that is not there yet."""
        part, t = parts.part(packed, "weight"), packed.tensors
        out = {key: t[key] for key in _OWN if key in t}
        inwards = packed.attrs["side"] == "in"
        if part.format == bipolar.name:
            if layout not in ("input_major", "row_major"):
                raise KernelError("E-KRN-LAYOUT", f"a thresholded weight in the layout {layout!r}", "use a kernel that reads input_major or row_major")
            out |= layouts.get(layout).repack(part)
        else:
            w = part.tensors["values"]
            out["weight_t" if inwards else "weight"] = w.t().contiguous() if inwards else w.contiguous()
        if not inwards:
            out["threshold"] = torch.full((1,), -1.0, device=next(iter(t.values())).device)
        return out

    @classmethod
    def restore(cls, like: Packed, tensors: dict[str, Tensor], layout: str) -> Packed:
        """The inverse of `arrange`."""
        part = parts.part(like, "weight")
        if part.format == bipolar.name:
            coded = {key: tensors[key] for key in _CODED if tensors.get(key) is not None}
            held = layouts.get(layout).restore(coded, part.shape, part.attrs).tensors
        else:
            held = {"values": tensors["weight_t"].t().contiguous() if like.attrs["side"] == "in" else tensors["weight"]}
        back = {f"weight.{key}": t for key, t in held.items()} | {key: tensors[key] for key in _OWN if key in like.tensors}
        return Packed(like.format, like.version, like.shape, {key: back[key] for key in like.tensors}, dict(like.attrs))

    def _bind(self, provider: Provider) -> None:
        super()._bind(provider)
        self._outwards = self._meta.attrs["side"] == "out"
        self._apart = op_of(self._meta) == "sparse_bipolar_linear" and "u" in self._meta.tensors

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., K) times the transposed weight, plus bias; small inputs skipped in calls of up to `limit` rows."""
        if self._outwards:
            op, names, scalars, kernel = self._form
            gate = x.new_ones(*x.shape[:-1], self.shape[0])  # no gate is below its threshold: all outputs are computed
            product: Tensor = op(x, gate, *[getattr(self, name) for name in names[1:]], bias, *scalars, kernel)
            return product
        y = super().linear(x, bias)
        if not self._apart:
            return y
        limit = self._form[2][-1]
        return y + sparsify.low_rank_rest(x, self.threshold, self.u, self.v, limit)  # type: ignore[arg-type]

    def limited(self, limit: int) -> None:
        """Skip in calls of up to `limit` rows, -1: in all."""
        now = self.packed()
        now.attrs["limit"] = limit
        self._install(now)

    @staticmethod
    def describe(packed: Packed) -> dict[str, Any]:
        """Precision, and what is skipped."""
        a = packed.attrs
        found: dict[str, Any] = {"bits": parts.precision(a), "side": a["side"], "limit": a["limit"]}
        if a["side"] == "in":
            found |= {"method": a["method"], "sparsity": round(a["realised"], 3)}
        return found | ({"rank": packed.tensors["u"].shape[1]} if "u" in packed.tensors else {})


