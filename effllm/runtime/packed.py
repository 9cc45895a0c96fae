"""Modules that own packed weights: what `effllm.compress` puts in the place of Linear and Embedding.

They work in eager and under any torch.compile backend, through the same ops that the `effllm` backend inserts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from effllm.lowering import bipolar_linear as ops
from effllm.lowering import providers
from effllm.lowering.op import Problem
from effllm.runtime import functional, layouts
from effllm.runtime.formats import bipolar
from effllm.runtime.formats.base import Packed


def problem_of(packed: Packed, *, act: str, dtype: torch.dtype, device: str, m: int | None = None) -> Problem:
    """The kernel problem that a linear with this weight poses."""
    a, (n, k) = packed.attrs, packed.shape
    op = "bipolar_linear_a8" if act == "a8" else "bipolar_linear"
    return Problem(op, n, k, a["bits"], a["group"], "minimum" in packed.tensors, act, m, dtype, device, packed.tensors["scale"].dtype)


class PackedWeight(functional.Refusing, nn.Module):
    """A packed (N, K) weight in the layout of the kernel that reads it. Buffers: codes, scale and, for affine grids, minimum.

    `act` is "a16" or "a8"; `kernel` a provider name, None for the best one on the weight's device. Torch functions that have a
    packed form take it like a tensor, see `functional`.
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor | None

    def __init__(self, packed: Packed, *, act: str = "a16", dtype: torch.dtype = torch.float32, kernel: str | None = None) -> None:
        super().__init__()
        self.act, self.dtype, self.wanted = act, dtype, kernel
        self._install(packed)

    def _install(self, packed: Packed) -> None:
        device = packed.tensors["scale"].device
        problem = problem_of(packed, act=self.act, dtype=self.dtype, device=device.type)
        if device.type == "meta":
            provider, self.why = ops.provider(problem.op, "reference"), "meta weight"
        else:
            provider, self.why = providers.select(problem, self.wanted)
        self.kernel, self.layout = provider.name, provider.layout
        self.shape, self.attrs = packed.shape, dict(packed.attrs)
        self.bits, self.group = int(packed.attrs["bits"]), int(packed.attrs["group"])
        self.zero = bipolar.zero_point(self.bits, packed.attrs["grid"], packed.attrs["source_bits"])
        # what calls read, as one constant: Dynamo guards every attribute that it sees, at every call
        self._form = (self.act, *packed.shape, self.bits, self.group, self.zero, ops.stamped(provider))
        tensors = layouts.get(self.layout).repack(packed)
        for key in ("codes", "scale", "minimum"):
            self.register_buffer(key, tensors.get(key))

    def packed(self) -> Packed:
        """The weight in its format's canonical layout."""
        tensors = {k: t for k in ("codes", "scale", "minimum") if (t := getattr(self, k)) is not None}
        return layouts.get(self.layout).restore(tensors, self.shape, self.attrs)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(b.numel() * b.element_size() for b in self.buffers())

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense (N, K) value."""
        return bipolar.unpack(self.packed(), dtype or self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        """Moves change the device and so the kernel and its layout; dtype casts change the activations' dtype only."""
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device))
        if probe.is_floating_point():
            self.dtype = probe.dtype
        if probe.device != self.codes.device:
            self._install(self.packed().to(probe.device))
        return self

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

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        return functional.dispatch(func, args, kwargs or {})

    @property
    def T(self) -> functional.Transposed:
        """The transposed weight, for `x @ weight.T`."""
        return functional.Transposed(self)

    @property
    def device(self) -> torch.device:
        """Where the packed tensors are."""
        return self.codes.device

    def __getitem__(self, ids: Any) -> Tensor:
        """Rows by an integer tensor, as from an embedding; other indices need the dense weight."""
        if isinstance(ids, Tensor) and not ids.is_floating_point() and ids.dtype != torch.bool:
            return self.gather(ids)
        raise functional.refused(f"weight[{type(ids).__name__}]")

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{self.shape[0]}x{self.shape[1]}, bits={self.bits}, group={self.group}, {self.attrs['grid']}, {self.act}, kernel={self.kernel}"


class PackedLinear(nn.Module):
    """Linear with a packed weight: x (..., in_features) to (..., out_features)."""

    def __init__(self, weight: PackedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.out_features, self.in_features = weight.shape
        if bias is None:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """The product in x's dtype."""
        return self.weight.linear(x, self.bias)


class PackedEmbedding(nn.Module):
    """Embedding with a packed weight: ids (...) to (..., embedding_dim)."""

    def __init__(self, weight: PackedWeight, padding_idx: int | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """The rows in the weight's activation dtype."""
        return self.weight.gather(ids)


def packed_weights(model: nn.Module) -> dict[str, PackedWeight]:
    """Every distinct packed weight by its first name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedWeight)}


def summary(model: nn.Module) -> dict[str, Any]:
    """Total bytes and bits per weight of the packed part of a model."""
    weights = packed_weights(model).values()
    count = sum(w.shape[0] * w.shape[1] for w in weights)
    size = sum(w.nbytes for w in weights)
    return {"packed_weights": len(weights), "bytes": size, "bits_per_weight": 8 * size / count if count else 0.0}
