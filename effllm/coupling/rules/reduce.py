"""Sums, norms and softmax over axes: the order along the axis does not matter, what is permuted differently along it does."""

from __future__ import annotations

from effllm.coupling.axes import UNIT, fresh, pin
from effllm.coupling.rules.base import Axes, Call, Result, broadcast, dims_of, rule
from effllm.coupling.rules.shape import unknown


def _without(axes: Axes, dims: list[int], keep: bool = False) -> Axes:
    return [UNIT if i in dims else a for i, a in enumerate(axes) if keep or i not in dims]


@rule("sum", "mean", "amax", "amin", "any", "all", "var", "std", "logsumexp", "prod", "linalg_vector_norm", "norm", "nansum")
def reduction(call: Call) -> Axes:
    """An axis is gone, or of size 1."""
    axes = call.axes("self")
    return _without(axes, dims_of(call, len(axes)), bool(call.args.get("keepdim")))


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax")
def softmax(call: Call) -> Axes:
    """Every slice along the axis divided by its sum."""
    axes = call.axes("self")
    call.reduced.append(_without(axes, dims_of(call, len(axes))))
    return list(axes)


@rule("layer_norm", "rms_norm")
def norm(call: Call) -> Axes:
    """The last axes divided by their norm, weight and bias along them."""
    axes = call.axes("input")
    last = len(call.args["normalized_shape"])
    extra = [call.axes(name) for name in ("weight", "bias") if call.has(name)]
    broadcast([axes[-last:], *extra], call.why)
    call.reduced.append(axes[:-last])
    return list(axes)


@rule("cumsum", "cumprod", "flip", "roll", "diff", "tril", "triu")
def along(call: Call) -> Axes:
    """The order along an axis is part of the result."""
    axes = list(call.axes("self"))
    if call.has("prepend") or call.has("append") or call.op in ("aten.roll", "aten.flip", "aten.diff"):
        return unknown(call)
    dims = [len(axes) - 2, len(axes) - 1] if call.op in ("aten.tril", "aten.triu") else dims_of(call, len(axes))
    for d in dims:
        pin(axes[d], f"{call.why} goes along it")
    return axes


@rule("topk", "sort", "argsort")
def ranking(call: Call) -> Result:
    """Numbers of places along an axis: the places must stay."""
    axes = list(call.axes("self"))
    dim = call.args.get("dim", -1) % len(axes)
    pin(axes[dim], f"{call.why} numbers its places")
    value = call.node.meta["val"]
    sizes = [int(s) for s in (value[0] if isinstance(value, tuple | list) else value).shape]
    out = [fresh(sizes[i], f"result of {call.why}") if i == dim else a for i, a in enumerate(axes)]
    return [list(out), list(out)] if isinstance(value, tuple | list) else out


@rule("argmax", "argmin")
def argument(call: Call) -> Axes:
    """The number of a place along an axis."""
    axes = call.axes("self")
    dims = dims_of(call, len(axes))
    for d in dims:
        pin(axes[d], f"{call.why} numbers its places")
    return _without(axes, dims, bool(call.args.get("keepdim")))


@rule("index")
def index(call: Call) -> Axes:
    """Places chosen by number, on leading axes one beside the other; those keep their order, the others flow on."""
    axes, indices = call.axes("self"), call.args["indices"]
    given = [i for i, n in enumerate(indices) if n is not None]
    tensors = [call.of(indices[i]) for i in given]
    bools = any(str(indices[i].meta["val"].dtype) in ("torch.bool", "torch.uint8") for i in given)
    if bools or not given or given != list(range(given[0], given[0] + len(given))):
        return unknown(call)
    for i in given:
        pin(axes[i], f"{call.why} picks places by number")
    return [*axes[: given[0]], *broadcast(tensors, call.why), *axes[given[-1] + 1 :]]


@rule("index_select")
def index_select(call: Call) -> Axes:
    """Places of one axis chosen by number."""
    axes, dim = list(call.axes("self")), call.args["dim"]
    pin(axes[dim], f"{call.why} picks places by number")
    axes[dim] = call.axes("index")[0] if call.axes("index") else fresh(1)
    return axes
