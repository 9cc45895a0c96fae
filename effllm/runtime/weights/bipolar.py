"""bipolar-INT weights as modules. Buffers: codes, scale and, for affine grids, minimum."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from effllm.lowering import bipolar_linear as ops
from effllm.lowering.op import Problem, Provider
from effllm.runtime.formats import bipolar
from effllm.runtime.formats.base import Packed
from effllm.runtime.weights.base import PackedWeight


class BipolarWeight(PackedWeight):
    """A weight of 1 to 8 bits."""

    format: ClassVar[str] = bipolar.name
    codes: Tensor
    scale: Tensor
    minimum: Tensor | None

    @staticmethod
    def problem(packed: Packed, *, act: str, dtype: torch.dtype, device: str, m: int | None = None) -> Problem:
        """The kernel problem that a linear with this weight poses."""
        a, (n, k) = packed.attrs, packed.shape
        op = "bipolar_linear_a8" if act == "a8" else "bipolar_linear"
        return Problem(op, n, k, a["bits"], a["group"], "minimum" in packed.tensors, act, m, dtype, device, packed.tensors["scale"].dtype)

    @classmethod
    def optional(cls, packed: Packed) -> tuple[str, ...]:
        """Symmetric and integer grids store no minimum."""
        return ("minimum",)

    def _bind(self, provider: Provider) -> None:
        self.bits, self.group = int(self.attrs["bits"]), int(self.attrs["group"])
        self.zero = bipolar.zero_point(self.bits, self.attrs["grid"], self.attrs["source_bits"])
        self._form = (self.act, *self.shape, self.bits, self.group, self.zero, ops.stamped(provider))

    @staticmethod
    def describe(packed: Packed) -> dict[str, Any]:
        """Bits, group and grid."""
        return {key: packed.attrs[key] for key in ("bits", "group", "grid")}

    @property
    def label(self) -> str:
        """The recipe's short name."""
        return f"w{self.bits}{'a8' if self.act == 'a8' else ''}"

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., K) times the transposed weight, plus bias."""
        act, n, _, bits, group, zero, kernel = self._form
        if act == "a8":
            xq, xs = torch.ops.effllm.quantize_activation(x)
            y: Tensor = torch.ops.effllm.bipolar_linear_a8(xq, xs, self.codes, self.scale, self.minimum, bias, n, bits, group, zero, x.dtype, kernel)
            return y
        y = torch.ops.effllm.bipolar_linear(x, self.codes, self.scale, self.minimum, bias, n, bits, group, zero, kernel)
        return y

    def gather(self, ids: Tensor) -> Tensor:
        """Rows `ids` (...) as (..., K)."""
        _, n, k, bits, group, zero, kernel = self._form
        y: Tensor = torch.ops.effllm.bipolar_embedding(ids, self.codes, self.scale, self.minimum, n, k, bits, group, zero, self.dtype, kernel)
        return y
