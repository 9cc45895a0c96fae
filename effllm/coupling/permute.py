"""Reorder the channels of a coupled dimension in every parameter that has them, all or none."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effllm.coupling.capture import named_tensors
from effllm.coupling.dimension import Dimension
from effllm.errors import CouplingError


def permute(model: nn.Module, dimension: Dimension, permutation: Tensor, *, volatile: bool = False) -> None:
    """New channel i is old channel permutation[i], in place in every member; the model's outputs stay what they are up to rounding.

    permutation: (size,), or (*blocks, size) with an order per block. `volatile=True` also allows dimensions that reach buffers no checkpoint
    holds (rotary frequencies): a saved model would load with the frequencies in their old order. Raises CouplingError, with nothing
    written, for a pinned dimension, a wrong permutation, or a model that is not the captured one.
    """
    if dimension.pinned:
        cause = f"dimension {dimension.index} keeps its order: {'; '.join(dimension.pinned)}"
        raise CouplingError("E-CPL-PINNED", cause, "choose a dimension that is not pinned")
    if dimension.volatile and not volatile:
        cause = f"dimension {dimension.index} reaches {', '.join(dimension.volatile)}, which no checkpoint holds"
        raise CouplingError("E-CPL-VOLATILE", cause, "pass volatile=True for a model that is not saved and loaded again")
    rows = dimension.structure.check(permutation)
    work = _validated(model, dimension)
    orders = _orders(dimension, rows)
    done: list[tuple[Tensor, int, Tensor]] = []
    try:
        for (name, axis), order in orders.items():
            _reorder(work[name], axis, order)
            done.append((work[name], axis, order))
    except BaseException:  # an interrupt or a lack of memory between two members must not leave half of it
        for tensor, axis, order in reversed(done):
            _reorder(tensor, axis, torch.argsort(order))
        raise


def _orders(dimension: Dimension, rows: Tensor) -> dict[tuple[str, int], Tensor]:
    """Per (parameter, axis) the order of the whole axis."""
    orders: dict[tuple[str, int], Tensor] = {}
    for m in dimension.members:
        step = torch.arange(m.axis_size)
        places = m.places(dimension.size, dimension.structure.blocks)
        step[places] = torch.gather(places, 2, rows[:, None, :].expand_as(places))
        key = (m.parameter, m.axis)
        orders[key] = orders[key][step] if key in orders else step  # one after the other: both factors of a (d, d) axis may be members
    return orders


def _reorder(tensor: Tensor, axis: int, order: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(tensor.index_select(axis, order.to(tensor.device)))


def _validated(model: nn.Module, dimension: Dimension) -> dict[str, Tensor]:
    """The members' tensors, after everything that could go wrong with them was looked at."""
    named = named_tensors(model)
    tensors = dict(named)
    found: dict[str, Tensor] = {}
    for m in dimension.members:
        tensor = tensors.get(m.parameter)
        if tensor is None or tensor.dim() <= m.axis or tensor.shape[m.axis] != m.axis_size:
            shape = "none" if tensor is None else tuple(tensor.shape)
            cause = f"{m.parameter}[{m.axis}] had {m.axis_size} places, now its shape is {shape}"
            raise CouplingError("E-CPL-MODEL", cause, "capture the graph of this model anew")
        if tensor.is_meta:
            raise CouplingError("E-CPL-META", f"{m.parameter} is on the meta device and has no values", "load the weights first")
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise CouplingError("E-CPL-INFERENCE", f"{m.parameter} was created under inference_mode", "call permute under torch.inference_mode() as well")
        if tensor.layout != torch.strided:
            raise CouplingError("E-CPL-LAYOUT", f"{m.parameter} has layout {tensor.layout}", "permute before the weights are packed")
        names = tuple(sorted(n for n, t in named if t is tensor))
        if names != dimension.names.get(m.parameter, names):
            cause = f"{m.parameter} was {', '.join(dimension.names[m.parameter])} when captured, now it is {', '.join(names)}"
            raise CouplingError("E-CPL-TIED", cause, "capture the graph again after tying or untying weights")
        found[m.parameter] = tensor
    _no_overlap(named, found)
    return found


def _no_overlap(named: list[tuple[str, Tensor]], members: dict[str, Tensor]) -> None:
    """No tensor may be permuted twice, or by surprise, because it lies in the memory of another."""
    spans: dict[int, list[tuple[int, int, str, Tensor]]] = {}
    seen: set[int] = set()
    for name, t in named:
        if id(t) in seen or t.numel() == 0 or t.is_meta or t.layout != torch.strided:
            continue
        seen.add(id(t))
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        start = t.data_ptr()
        spans.setdefault(t.untyped_storage().data_ptr(), []).append((start, start + (last + 1) * t.element_size(), name, t))
    ours = {id(t) for t in members.values()}
    for group in spans.values():
        for i, (a0, a1, a, t) in enumerate(group):
            for b0, b1, b, u in group[i + 1 :]:
                if a0 < b1 and b0 < a1 and (id(t) in ours or id(u) in ours):
                    cause = f"{a} and {b} share memory without being one parameter"
                    raise CouplingError("E-CPL-ALIAS", cause, "clone one of them, or tie them as one parameter")
    for name, t in members.items():
        if any(stride == 0 and size > 1 for size, stride in zip(t.shape, t.stride(), strict=True)):
            raise CouplingError("E-CPL-ALIAS", f"{name} is expanded: several of its elements are one", "make it contiguous")
