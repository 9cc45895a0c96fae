"""Weights whose op has the form op(x, tensors..., bias, scalars..., kernel): low-rank, sparse + low-rank, Monarch, N:M, ARMOR.

A format's class says which op serves a stored weight, in which order it takes the arranged tensors, and the scalars; the module's
forward and the node of a graph are both made from that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effllm.lowering.bipolar_linear import stamped
from effllm.lowering.op import Provider
from effllm.runtime.formats import parts
from effllm.runtime.formats.base import Packed
from effllm.runtime.weights.base import PackedWeight


@dataclass(frozen=True)
class Call:
    """`tensors` are names of arranged tensors in the op's order; one that a weight has not is passed as None."""

    op: str
    tensors: tuple[str, ...]
    scalars: tuple[Any, ...] = ()

    def arguments(self, x: Any, held: Mapping[str, Any], bias: Any, kernel: str) -> tuple[Any, ...]:
        """The op's arguments, of tensors or of graph nodes."""
        return (x, *(held.get(name) for name in self.tensors), bias, *self.scalars, kernel)


class StructuredWeight(PackedWeight):
    """Base of the classes that describe their op by a `Call`."""

    @staticmethod
    def call(packed: Packed) -> Call:
        """The op that serves a stored weight."""
        raise NotImplementedError

    @classmethod
    def optional(cls, packed: Packed) -> tuple[str, ...]:
        """Every tensor that the op may take."""
        return cls.call(packed).tensors

    def _bind(self, provider: Provider) -> None:
        found = self.call(self._meta)
        self._form = (getattr(torch.ops.effllm, found.op), found.tensors, found.scalars, stamped(provider))

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., K) times the transposed weight, plus bias."""
        op, names, scalars, kernel = self._form
        y: Tensor = op(x, *[getattr(self, name) for name in names], bias, *scalars, kernel)
        return y

    @property
    def precision(self) -> int:
        """Most bits of a stored number, 16 where none is quantized."""
        return parts.precision(self.attrs)

    @property
    def label(self) -> str:
        """Format and precision."""
        return self.format + ("" if self.precision == 16 else f" w{self.precision}")
