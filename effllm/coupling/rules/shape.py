"""Operators that only move elements: views, slices, concatenations, repeats."""

from __future__ import annotations

from math import prod
from typing import cast

from torch import fx

from effllm.coupling.axes import UNIT, Prod, Sum, cut, factor, fresh, pieces, pin, reshape, resolve
from effllm.coupling.rules.base import Axes, Call, broadcast, rule


@rule("view", "reshape", "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten", "unsqueeze", "squeeze", moves=True)
def view(call: Call) -> Axes:
    """Other sizes, same order of elements."""
    first = "input" if "input" in call.args else "self"
    if prod(a.size for a in call.axes(first)) != prod(call.out_sizes):  # the same bytes as another dtype
        return unknown(call)
    return reshape(call.axes(first), call.out_sizes, call.why)


@rule("transpose", "t", "permute", "swapaxes", "movedim", "numpy_T", "mT", moves=True)
def transpose(call: Call) -> Axes:
    """Axes in another order."""
    axes = call.axes("self")
    name, rank = call.op.removeprefix("aten."), len(axes)
    if name == "permute":
        return [axes[d] for d in call.args["dims"]]
    if name == "movedim":
        source, target = call.args["source"], call.args["destination"]
        moves = dict(zip([t % rank for t in _ints(target)], [s % rank for s in _ints(source)], strict=True))
        rest = iter([d for d in range(rank) if d not in moves.values()])
        return [axes[moves[d]] if d in moves else axes[next(rest)] for d in range(rank)]
    if name == "numpy_T" or (name == "t" and rank < 2):
        return axes[::-1]
    if name in ("t", "mT"):
        a, b = rank - 2, rank - 1
    else:
        a, b = (int(call.args[k]) for k in (("dim0", "dim1") if "dim0" in call.args else ("axis0", "axis1")))
    out = list(axes)
    out[a], out[b] = axes[b], axes[a]
    return out


def _ints(value: int | list[int]) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


@rule("expand", "expand_as", "broadcast_to", moves=True)
def expand(call: Call) -> Axes:
    """Axes of size 1 repeated: the copies are equal, so the new axis may be in any order."""
    axes, sizes = call.axes("self"), call.out_sizes
    axes = [UNIT] * (len(sizes) - len(axes)) + list(axes)
    return [fresh(s) if a.size == 1 else a for a, s in zip(axes, sizes, strict=True)]


@rule("repeat", moves=True)
def repeat(call: Call) -> Axes:
    """The whole axis over and over."""
    axes, counts = call.axes("self"), call.args["repeats"]
    axes = [UNIT] * (len(counts) - len(axes)) + list(axes)
    return [resolve(Prod((fresh(r), a))) for a, r in zip(axes, counts, strict=True)]


@rule("repeat_interleave", moves=True)
def repeat_interleave(call: Call) -> Axes:
    """Every element several times in a row; only a fixed number of times is understood."""
    axes, count, dim = call.axes("self"), call.args["repeats"], call.args.get("dim")
    if dim is None and len(axes) == 1:
        dim = 0
    if dim is None or not isinstance(count, int):
        return unknown(call)
    out = list(axes)
    out[dim] = resolve(Prod((axes[dim], fresh(count))))
    return out


def unknown(call: Call) -> Axes:
    """Nothing is known: the operands and the result keep their order."""
    for node in call.node.all_input_nodes:
        for axis in call.of(node):
            pin(axis, f"{call.why} is not understood here")
    return [fresh(s, f"result of {call.why}") for s in call.out_sizes]


@rule("slice", moves=True)
def slices(call: Call) -> Axes:
    """A part of an axis, or one place of every block (a step that divides the axis)."""
    axes, dim = list(call.axes("self")), call.args["dim"] or 0
    whole = axes[dim]
    start, end, step = (call.args.get(k) for k in ("start", "end", "step"))
    size, step = whole.size, 1 if step is None else step
    start = _clamp(0 if start is None else start, size)
    end = max(start, _clamp(size if end is None else end, size))
    if step > 1:
        if size % step or start >= step or end < size:
            pin(whole, f"{call.why} takes every {step}th of {size}")
            axes[dim] = fresh(call.out_sizes[dim], f"result of {call.why}")
            return axes
        outer, inner = factor(whole, step, call.why)
        pieces(inner, [start, 1, step - start - 1], call.why)
        axes[dim] = outer
        return axes
    axes[dim] = pieces(whole, [start, end - start, size - end], call.why)[1]
    return axes


def _clamp(place: int, size: int) -> int:
    return max(0, min(place + size if place < 0 else place, size))


@rule("narrow", moves=True)
def narrow(call: Call) -> Axes:
    """A part of an axis."""
    axes, dim, start, length = list(call.axes("self")), call.args["dim"], call.args["start"], call.args["length"]
    axes[dim] = pieces(axes[dim], [start, length, axes[dim].size - start - length], call.why)[1]
    return axes


@rule("select", moves=True)
def select(call: Call) -> Axes:
    """One place of an axis, which thereby keeps its place."""
    axes, dim, index = list(call.axes("self")), call.args["dim"], call.args["index"]
    whole = axes.pop(dim)
    index %= whole.size
    pieces(whole, [index, 1, whole.size - index - 1], call.why)
    return axes


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unbind", "unsafe_split", "unsafe_chunk", moves=True)
def split(call: Call) -> list[Axes]:
    """Consecutive parts of an axis."""
    axes, dim = call.axes("self"), (call.args.get("dim") or 0) % len(call.axes("self"))
    if call.op == "aten.unbind":
        pieces(axes[dim], [1] * axes[dim].size, call.why)
        return [[a for i, a in enumerate(axes) if i != dim] for _ in call.all_sizes]
    parts = pieces(axes[dim], [s[dim] for s in call.all_sizes], call.why)
    return [[part if i == dim else a for i, a in enumerate(axes)] for part in parts]


@rule("cat", "concat", "concatenate", moves=True)
def cat(call: Call) -> Axes:
    """Parts one after the other; the other axes are permuted together."""
    tensors = [call.of(n) for n in cast(list[fx.Node], call.args["tensors"])]
    dim = (call.args.get("dim") or 0) % len(tensors[0])
    tensors = [t for t in tensors if t[dim].size] or tensors[:1]
    others = broadcast([[UNIT if i == dim else a for i, a in enumerate(t)] for t in tensors], call.why)
    return [resolve(Sum(tuple(t[dim] for t in tensors))) if i == dim else a for i, a in enumerate(others)]


@rule("stack", moves=True)
def stack(call: Call) -> Axes:
    """A new axis whose places are known one by one."""
    tensors = [call.of(n) for n in cast(list[fx.Node], call.args["tensors"])]
    out = broadcast(tensors, call.why)
    dim = (call.args.get("dim") or 0) % (len(out) + 1)
    out.insert(dim, resolve(Sum((UNIT,) * len(tensors))))
    return out


@rule("pad", "constant_pad_nd", moves=True)
def pad(call: Call) -> Axes:
    """Constants before and after, or values taken away."""
    axes, widths = list(call.axes("self")), call.args["pad"]
    if call.args.get("mode", "constant") != "constant":
        return unknown(call)
    for i in range(len(widths) // 2):
        before, after = widths[2 * i], widths[2 * i + 1]
        axis = axes[-1 - i]
        if before < 0:
            axis = cut(axis, -before, call.why)[1]
        if after < 0:
            axis = cut(axis, axis.size + after, call.why)[0]
        parts = [fresh(before)] * (before > 0) + [axis] + [fresh(after)] * (after > 0)
        axes[-1 - i] = resolve(Sum(tuple(parts)))
    return axes
