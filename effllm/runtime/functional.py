"""What torch functions do with a packed weight: `F.linear(x, m.weight)`, `x @ m.weight.T`, `m.weight @ x`, `F.embedding(ids, m.weight)`.

Code that reads a module's weight instead of calling the module (a tied head written by hand, a loss over the vocabulary) gets the
right product through the packed kernels; the dense weight is not made. Every other function is refused with what to do instead.
Both ways work in eager mode and inside a compiled graph, where Dynamo traces the same dispatch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effllm import compat
from effllm.errors import WeightError

if TYPE_CHECKING:
    from effllm.runtime.packed import PackedWeight

_MATMUL = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm)
_STEP = "call the module itself, use F.linear, F.embedding, x @ weight.T or weight @ x, or take weight.dense() and pay for a dense copy"


class PackedUseError(WeightError, AttributeError):
    """A packed weight used in a way that only a dense tensor allows (E-WGT-USE)."""


def refused(what: str) -> PackedUseError:
    """The error for a use that has no packed form."""
    return PackedUseError("E-WGT-USE", f"{what} needs a dense weight, and this one is packed", _STEP)


def _refusing(name: str) -> Any:
    def method(self: Any, *_: Any, **__: Any) -> Any:
        raise refused(f"weight.{name}()")

    return method


class Refusing:
    """A tensor's common methods, refused when called; `data` is an AttributeError of nn.Module, so that hasattr works.

    Methods and no `__getattr__`: with one, Dynamo takes a module's buffers for plain inputs and compiles dynamic shapes for them.
    """

    transpose = _refusing("transpose")
    t = _refusing("t")
    permute = _refusing("permute")
    reshape = _refusing("reshape")
    view = _refusing("view")
    contiguous = _refusing("contiguous")
    clone = _refusing("clone")
    detach = _refusing("detach")
    copy_ = _refusing("copy_")
    matmul = _refusing("matmul")
    mean = _refusing("mean")
    sum = _refusing("sum")
    norm = _refusing("norm")
    numpy = _refusing("numpy")
    tolist = _refusing("tolist")


class Transposed:
    """`weight.T`: good for `x @ weight.T`, and for `.T`, which gives the weight back. Holds no data of its own."""

    def __init__(self, weight: PackedWeight) -> None:
        self.T = weight
        self.shape = (weight.shape[1], weight.shape[0])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        return dispatch(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        raise refused(f"weight.T.{name}") if hasattr(Tensor, name) else AttributeError(name)


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Run a torch function that was given a packed weight. Raises PackedUseError."""
    if func in compat.LINEAR:
        return _linear(*args, **kwargs)
    if func in compat.EMBEDDING:
        return _embedding(*args, **kwargs)
    if func in _MATMUL and len(args) == 2 and not kwargs and isinstance(args[1], Transposed):
        return _linear(args[0], args[1].T)
    if func in _MATMUL and len(args) == 2 and not kwargs and hasattr(args[0], "linear"):
        return left(*args)
    name = getattr(func, "__name__", str(func))
    raise refused(name)


def _linear(input: Any, weight: Any, bias: Any = None) -> Tensor:
    if not isinstance(input, Tensor) or not hasattr(weight, "linear"):
        raise refused("linear with a packed input")
    if input.shape[-1] != weight.shape[1]:
        cause = f"an input of shape {tuple(input.shape)} does not fit a weight of shape {tuple(weight.shape)}"
        raise WeightError("E-WGT-SHAPE", cause, f"its last dimension must be {weight.shape[1]}")
    y: Tensor = weight.linear(input, bias)
    return y


def left(weight: Any, input: Any) -> Tensor:
    """weight (N, K) @ input (K,) or (..., K, T): the linear of the input's columns (Mamba's step sizes)."""
    if not isinstance(input, Tensor) or not hasattr(weight, "linear"):
        raise refused("a product with a packed input")
    return _linear(input, weight) if input.dim() == 1 else _linear(input.mT, weight).mT


def _embedding(
    input: Any, weight: Any, padding_idx: int | None = None, max_norm: float | None = None, norm_type: float = 2.0,
    scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Tensor:  # fmt: skip
    # padding_idx, norm_type and the two flags concern gradients or max_norm only: a packed weight has no gradient
    if not isinstance(input, Tensor) or not hasattr(weight, "gather"):
        raise refused("embedding with a packed index")
    if max_norm is not None:
        raise refused("embedding with max_norm, which changes the weight,")
    y: Tensor = weight.gather(input)
    return y
