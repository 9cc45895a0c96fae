"""What every module that owns a packed weight offers: bytes, dense value, moves between devices, and the product.

One subclass per format. It names the kernel problem that its linear poses and calls the op on the tensors that `_install` arranged;
everything else is here. Torch functions that have a packed form take the module like a tensor, see `functional`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from effllm.lowering import providers
from effllm.lowering.bipolar_linear import provider as named
from effllm.lowering.op import Problem, Provider
from effllm.runtime import formats, functional, pages
from effllm.runtime.formats import parts
from effllm.runtime.formats.base import Packed
from effllm.runtime.layouts import compose


class PackedWeight(functional.Refusing, nn.Module):
    """A packed (N, K) weight in the layout of the kernel that reads it.

    `act` is "a16" or "a8"; `kernel` a provider name, None for the best one on the weight's device, `why` says why that one. Quantized
    tensors are buffers; floating-point parts are parameters, constant until something asks for their gradient.
    """

    format: ClassVar[str]
    recovery_factors: ClassVar[tuple[str, ...]] = ()  # arranged tensors that are parameters where they are floating point

    def __init__(self, packed: Packed, *, act: str = "a16", dtype: torch.dtype = torch.float32, kernel: str | None = None) -> None:
        super().__init__()
        self.act, self.dtype, self.wanted = act, dtype, kernel
        self._install(packed)

    @staticmethod
    def problem(packed: Packed, *, act: str, dtype: torch.dtype, device: str, m: int | None = None) -> Problem:
        """The kernel problem that a linear with this weight poses."""
        raise NotImplementedError

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., K) times the transposed weight, plus bias."""
        raise NotImplementedError

    def gather(self, ids: Tensor) -> Tensor:
        """Rows `ids` (...) as (..., K), where the format can."""
        raise functional.refused(f"an embedding lookup in the format {self.format!r}")

    @property
    def config(self) -> dict[str, Any]:
        """What a Decision says of the module."""
        return {**self.describe(self._meta), "act": self.act}

    @property
    def label(self) -> str:
        """A word for the weight's precision or structure."""
        raise NotImplementedError

    def _bind(self, provider: Provider) -> None:
        """Keep what calls read as constants; Dynamo guards every attribute that it sees, at every call."""

    def _install(self, packed: Packed) -> None:
        device = next(iter(packed.tensors.values())).device
        problem = self.problem(packed, act=self.act, dtype=self.dtype, device=device.type)
        if device.type == "meta":
            provider, self.why = named(problem.op, "reference"), "meta weight"
        else:
            provider, self.why = providers.select(problem, self.wanted)
        self.kernel, self.layout = provider.name, provider.layout
        self.shape, self.attrs, self._meta = packed.shape, dict(packed.attrs), packed.to("meta")
        self._bind(provider)
        trained = {name for name, p in self._parameters.items() if p is not None and p.requires_grad}
        tensors = {key: pages.place(t) for key, t in self.arrange(packed, self.layout).items()}
        for key in dict.fromkeys((*self.optional(packed), *tensors)):
            if key in self.recovery_factors and key in tensors and tensors[key].is_floating_point():
                self.register_parameter(key, nn.Parameter(tensors[key], requires_grad=key in trained))
            else:
                self.register_buffer(key, tensors.get(key))

    @classmethod
    def arrange(cls, packed: Packed, layout: str) -> dict[str, Tensor]:
        """The tensors that a kernel reads."""
        return compose.arrange(packed, layout)

    @classmethod
    def restore(cls, like: Packed, tensors: dict[str, Tensor], layout: str) -> Packed:
        """The inverse of `arrange`; `like` is the weight on the meta device."""
        return compose.restore(like, tensors, layout)

    @staticmethod
    def describe(packed: Packed) -> dict[str, Any]:
        """What a Decision says of a stored weight."""
        raise NotImplementedError

    @classmethod
    def optional(cls, packed: Packed) -> tuple[str, ...]:
        """Buffers that not every weight of the format has; None where it has not."""
        return ()

    def canonical(self) -> Packed:
        """The weight in its format's canonical layout, on the meta device: shapes, dtypes and attributes."""
        return self._meta

    def tensors(self) -> dict[str, Tensor]:
        """The tensors held, by the names of the kernel's layout."""
        return {k: t.detach() for k, t in (*self._buffers.items(), *self._parameters.items()) if t is not None}

    def packed(self) -> Packed:
        """The weight in its format's canonical layout."""
        return self.restore(self._meta, self.tensors(), self.layout)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense (N, K) value."""
        found: Tensor = formats.get(self.format).unpack(self.packed(), dtype or self.dtype)
        return found

    @property
    def device(self) -> torch.device:
        """Where the packed tensors are."""
        return next(iter(self.tensors().values())).device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves change the device and so the kernel and its layout; dtype casts change activations and floating-point parts only."""
        device = self.device
        probe = fn(torch.empty(0, dtype=self.dtype, device=device))
        cast = {f"{key}.values" for key in parts.names(self._meta)} & self._meta.tensors.keys()
        changed = probe.device != device or bool(cast and probe.dtype != self.dtype and probe.is_floating_point())
        if probe.is_floating_point():
            self.dtype = probe.dtype
        if changed:
            packed = self.packed().to(probe.device)
            packed.tensors = {k: t.to(self.dtype) if k in cast else t for k, t in packed.tensors.items()}
            self._install(packed)
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        return functional.dispatch(func, args, kwargs or {})

    @property
    def T(self) -> functional.Transposed:
        """The transposed weight, for `x @ weight.T`."""
        return functional.Transposed(self)

    def __matmul__(self, other: Any) -> Tensor:
        """weight @ x for x (K,) or (..., K, T). Dynamo swaps the sides of this operator and breaks the graph; `torch.matmul` stays in one."""
        return functional.left(self, other)

    def __getitem__(self, ids: Any) -> Tensor:
        """Rows by an integer tensor, as from an embedding; other indices need the dense weight."""
        if isinstance(ids, Tensor) and not ids.is_floating_point() and ids.dtype != torch.bool:
            return self.gather(ids)
        raise functional.refused(f"weight[{type(ids).__name__}]")

    def extra_repr(self) -> str:
        """What print(model) shows."""
        about = ", ".join(f"{k}={v}" for k, v in self.config.items())
        return f"{self.shape[0]}x{self.shape[1]}, {about}, kernel={self.kernel}"
