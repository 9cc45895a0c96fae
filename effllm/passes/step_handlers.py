"""Instructions of graph nodes: which nodes have one, by operation and dtypes, and how each is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from effllm import compat
from effllm.autotune import use
from effllm.lowering.bipolar_linear import layout_of, plain, provider
from effllm.lowering.op import OPS, rows_of
from effllm.lowering.step_code import BINARY, DIMS, KINDS, UNARY, Value
from effllm.lowering.step_parts import RANGE, WORKSPACE
from effllm.passes.match import arguments, cast, name, writes
from effllm.passes.step_calls import callable_op, emit_call
from effllm.passes.step_views import MAYBE, Unsupported, views

if TYPE_CHECKING:
    from effllm.passes.step_nodes import Emitter

PACKED = ("bipolar_linear", "bipolar_linear_many", "bipolar_linear_a8", "bipolar_linear_a8_many")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_UNARY = ("silu", "relu", "sigmoid", "tanh", "neg", "cos", "sin")
_WHOLE = (torch.int64, torch.bool)
_TRUTHS = {**{n: n for n in BINARY[BINARY.index("le") :]}, **dict.fromkeys(("and_", "__and__", "logical_and", "bitwise_and"), "and"),
           **dict.fromkeys(("or_", "__or__", "logical_or", "bitwise_or"), "or")}  # fmt: skip


def kernel_of(node: fx.Node) -> str:
    """The kernel that a node of ours names, without its stamp; empty for others."""
    last = arguments(node)[-1] if arguments(node) and _op(node) else None
    return plain(last) if isinstance(last, str) and compat.argument_names(node.target)[-1] == "kernel" else ""


def _op(node: fx.Node) -> str:
    text = str(node.target)
    return text.split(".")[1] if node.op == "call_function" and text.startswith("effllm.") else ""


_Handler = Callable[["Emitter", fx.Node], None]


def handler(node: fx.Node) -> _Handler | None:
    if node.op not in ("call_function", "call_method") or views(node):
        return None
    op = _op(node)
    if op:
        if kernel_of(node) and not kernel_of(node).startswith("cpu-"):
            return None
        return _OURS.get(op) or (emit_call if kernel_of(node) else None)
    if node.target in compat.LINEAR:
        return _dense
    if node.target in compat.EMBEDDING:
        return _embedding
    if node.target is torch.nn.functional.layer_norm:
        return _layer_norm
    what = name(node)
    if what in MAYBE or cast(node) is not None or what == "clone":
        return _copy
    if what == "setitem" and not isinstance(arguments(node)[0], fx.Node):
        return None
    if what == "arange" and arguments(node) and all(isinstance(a, int) for a in arguments(node)):
        return _arange
    return _PLAIN.get(what)


def fits(node: fx.Node) -> bool:
    """Whether the node's tensors are of kinds and ranks that instructions take."""
    if handler(node) is emit_call:
        return callable_op(node)
    own = () if name(node) == "setitem" else (node,)
    values = [compat.example_value(n) for n in (*own, *node.all_input_nodes)]
    flat = [t for v in values for t in (v if isinstance(v, tuple | list) else (v,))]
    if not all(isinstance(t, Tensor) and t.dim() <= DIMS and all(isinstance(s, int) for s in t.shape) for t in flat):
        return False
    if _op(node) in PACKED:
        return True
    if _op(node) == "prompt_attention":
        return not arguments(node)[4] and flat[2].shape == flat[3].shape
    if _op(node) == "bipolar_embedding":
        ids = compat.example_value(arguments(node)[0])
        return ids.dtype == torch.int64 and layout_of("bipolar_embedding", kernel_of(node)) == "tile16"
    if node.target in compat.EMBEDDING:
        return _plain_embedding(node)
    what = name(node)
    if what in _TRUTHS:
        both = what in ("and", "or") or _TRUTHS[what] in ("and", "or")
        numbers = [a for a in arguments(node) if not isinstance(a, fx.Node)]
        if node.kwargs or len(arguments(node)) != 2 or any(type(a) is not int for a in numbers) or (both and numbers):
            return False
        ins = [compat.example_value(n).dtype for n in node.all_input_nodes]
        return compat.example_value(node).dtype == torch.bool and all(d == torch.bool if both else d in _WHOLE for d in ins)
    if what == "getitem":
        given = arguments(node)[1]
        return isinstance(given, tuple) and len(given) == flat[1].dim() and all(isinstance(i, fx.Node) and _is_range(i) for i in given)
    if what == "new_ones":
        return compat.example_value(node).dtype == torch.bool and all(name(u) in _TRUTHS for u in node.users)
    if what == "argmax":
        return flat[1].dtype in _FLOATS and [*arguments(node)[1:2], *node.kwargs.values()] in ([-1], [flat[1].dim() - 1])
    if what in ("matmul", "bmm"):
        return all(t.dtype == torch.float32 for t in flat) and len(flat) == 3 and min(t.dim() for t in flat) > 1 and flat[1].shape[-1] == 1
    if what in ("add", "sub", "mul", "div", "add_", "mul_"):
        dtypes = {t.dtype for t in flat}
        numbers = [a for a in arguments(node) if isinstance(a, float | int)]
        if node.kwargs or len(arguments(node)) != 2 or any(isinstance(a, bool) for a in numbers):
            return False
        whole = dtypes == {torch.int64} and not any(isinstance(a, float) for a in numbers)
        return whole or all(d in _FLOATS for d in dtypes)
    if what == "pow":
        return all(t.dtype in _FLOATS for t in flat) and arguments(node)[1:] in ((2,), (3,), (2.0,), (3.0,))
    if cast(node) is not None and compat.example_value(node).dtype == torch.bool:
        return flat[1].dtype == torch.int64
    if cast(node) is not None and compat.example_value(node).dtype in _FLOATS:
        return all(t.dtype in (*_FLOATS, torch.int64) for t in flat)
    if what in (*_UNARY, "gelu") or node.target is torch.nn.functional.layer_norm or cast(node) is not None:
        return all(t.dtype in _FLOATS for t in flat)
    return all(t.dtype in KINDS for t in flat)


def _is_range(node: fx.Node) -> bool:
    """Whether a node's value is a range from a known number on, or a view of one."""
    while views(node) or (name(node) in ("add", "sub") and len(arguments(node)) == 2 and type(arguments(node)[1]) is int):
        node = arguments(node)[0]
    return name(node) == "arange" and 1 <= len(arguments(node)) <= 2 and all(type(a) is int for a in arguments(node))


def _plain_embedding(node: fx.Node) -> bool:
    given = dict(zip(("input", "weight", "padding_idx", "max_norm"), arguments(node), strict=False)) | dict(node.kwargs)
    if not isinstance(given["input"], fx.Node) or not isinstance(given["weight"], fx.Node) or given.get("max_norm") is not None:
        return False
    ids, table = (compat.example_value(given[n]) for n in ("input", "weight"))
    dense = table.dim() == 2 and table.stride(1) == 1 and table.dtype in _FLOATS and table.dtype == compat.example_value(node).dtype
    return dense and ids.dtype == torch.int64 and ids.dim() < DIMS


def _unary(e: Emitter, node: fx.Node) -> None:
    what = name(node)
    if what == "gelu":
        kind = node.kwargs.get("approximate", arguments(node)[1] if len(arguments(node)) > 1 else "none")
        what = "gelu" if kind == "none" else "gelu_tanh"
    x = e.value(arguments(node)[0])
    e.builder.emit("unary", [e.produce(node), x], (UNARY.index(what),))


def _binary(e: Emitter, node: fx.Node) -> None:
    like = compat.example_value(node)
    parts = []
    whole = like.dtype in _WHOLE
    what = name(node)
    first, second = arguments(node)
    if what in ("add", "sub") and isinstance(first, fx.Node) and type(second) is int:
        value = e.value(first, ranges=True)
        if value.buffer.slot == RANGE:  # another range
            moved = e.builder.range(value.buffer.offset + (second if what == "add" else -second), value.buffer.numel)
            e.values[node] = moved.like(value.meta)
            return
    for a in arguments(node):
        if isinstance(a, fx.Node):
            value = e.value(a, ranges=whole)
            parts.append(value.like(value.meta.expand(like.shape)))
        else:
            number = e.builder.constant([a], torch.int64 if whole else torch.float32, ())
            parts.append(number.like(number.meta.expand(like.shape)))
    what = _TRUTHS.get(what, what)
    if what.endswith("_"):
        target = e.value(arguments(node)[0])
        e.values[node] = target
        e.builder.emit("binary", [target, *parts], (BINARY.index(what[:-1]),))
    else:
        e.builder.emit("binary", [e.produce(node), *parts], (BINARY.index(what),))


def _outer(e: Emitter, node: fx.Node) -> None:
    """A product of a column and a row, as angles are made."""
    like = compat.example_value(node)
    parts = [v.like(v.meta.expand(like.shape)) for v in map(e.value, arguments(node))]
    e.builder.emit("binary", [e.produce(node), *parts], (BINARY.index("mul"),))


def _embedding(e: Emitter, node: fx.Node) -> None:
    given = dict(zip(("input", "weight"), arguments(node), strict=False)) | dict(node.kwargs)
    ids, table = e.value(given["input"]), e.value(given["weight"])
    e.builder.emit("rows", [e.produce(node), ids, table])


def _packed_embedding(e: Emitter, node: fx.Node) -> None:
    ids, codes, scale, minimum, n, _, bits, group, zero, *_ = arguments(node)
    e.use_kernel(node, kernel_of(node))
    blocks, groups = compat.example_value(codes).shape[1], compat.example_value(scale).shape[1]
    half = compat.example_value(scale).dtype == torch.float16
    low = None if minimum is None else e.value(minimum)
    e.builder.emit("packed_rows", [e.produce(node), e.value(ids), e.value(codes), e.value(scale), low],
                   (n, bits, group, e.builder.number(zero), half, blocks, groups))  # fmt: skip


def _largest(e: Emitter, node: fx.Node) -> None:
    e.builder.emit("largest", [e.produce(node), e.value(arguments(node)[0])])


def _pow(e: Emitter, node: fx.Node) -> None:
    x, times = e.value(arguments(node)[0]), BINARY.index("mul")
    made = e.produce(node)
    if arguments(node)[1] == 2:
        e.builder.emit("binary", [made, x, x], (times,))
        return
    square = e.builder.produce(x.meta.shape, torch.float32)
    e.builder.emit("binary", [square, x, x], (times,))
    e.builder.emit("binary", [made, square, x], (times,))


def _changed(node: fx.Node) -> bool:
    """Whether a value, or what it is a view of, is changed in place."""
    while views(node):
        node = arguments(node)[0]
    todo = [node]
    while todo:
        users = list(todo.pop().users)
        if any(writes(u) for u in users):
            return True
        todo += [u for u in users if views(u)]
    return False


def _copy(e: Emitter, node: fx.Node) -> None:
    source = e.value(arguments(node)[0], ranges=True)
    if name(node) == "contiguous" and source.buffer.slot == WORKSPACE and not _changed(arguments(node)[0]):
        e.values[node] = source  # whoever cannot read it with its gaps makes a copy
        return
    made = e.produce(node)
    if made.meta.dtype == torch.bool and source.meta.dtype == torch.int64:
        none = e.builder.constant([0], torch.int64, ())
        e.builder.emit("binary", [made, source, none.like(none.meta.expand(source.meta.shape))], (BINARY.index("ne"),))
        return
    e.builder.emit("copy", [made.like(made.meta.view(source.meta.shape)), source])


def _cat(e: Emitter, node: fx.Node) -> None:
    dim: Any = node.kwargs.get("dim", arguments(node)[1] if len(arguments(node)) > 1 else 0)
    made, at = e.produce(node), 0
    for part in arguments(node)[0]:
        value = e.value(part)
        size = value.meta.shape[dim]
        e.builder.emit("copy", [made.like(made.meta.narrow(dim, at, size)), value])
        at += size


def _arange(e: Emitter, node: fx.Node) -> None:
    like = compat.example_value(node)
    numbers = range(*arguments(node))
    if like.dtype != torch.int64 or (numbers.step != 1 and len(numbers) > 64):
        raise Unsupported(node, "a range of another dtype, or a long one with steps")
    e.values[node] = e.builder.range(numbers.start, len(numbers)) if numbers.step == 1 else e.builder.constant(list(numbers), torch.int64, like.shape)


def _ones(e: Emitter, node: fx.Node) -> None:
    """The truth that masks of several conditions begin with."""
    one = e.builder.constant([1], torch.int64, ())
    e.values[node] = one.like(one.meta.expand(compat.example_value(node).shape))


def _lookup(e: Emitter, node: fx.Node) -> None:
    """x[i, j] where the indices are ranges, each along a dimension of its own: a view."""
    source, indices = arguments(node)
    x, shape = e.value(source), compat.example_value(node).shape
    stride, offset = [0] * len(shape), x.meta.storage_offset()
    for n, along, size in zip(indices, x.meta.stride(), x.meta.shape, strict=True):
        index = e.value(n, ranges=True)
        first = index.buffer.offset + index.meta.storage_offset()
        if first < 0 or first + index.meta.numel() > size:
            raise Unsupported(node, "an index out of range")
        offset += along * first
        for d in range(1, index.meta.dim() + 1):
            stride[-d] += along * index.meta.stride(-d) * (index.meta.shape[-d] > 1)
    e.values[node] = x.like(x.meta.as_strided(shape, stride, offset))


def _write(e: Emitter, node: fx.Node) -> None:
    target, dim, index, source = arguments(node)
    into, at, new = (e.value(n) for n in (target, index, source))
    if dim not in (into.meta.dim() - 2, -2) or into.meta.dtype != new.meta.dtype:
        raise Unsupported(node, f"it writes along dimension {dim}")
    e.values[node] = into
    e.builder.emit("write", [into, at, new], (False,))


def _roll(e: Emitter, node: fx.Node) -> None:
    given = dict(zip(("input", "shifts", "dims"), arguments(node), strict=False)) | dict(node.kwargs)
    value = e.value(given["input"])
    dim, size = given.get("dims"), value.meta.dim()
    if not isinstance(dim, int) or not isinstance(given["shifts"], int):
        raise Unsupported(node, "it rolls along several dimensions")
    made, n = e.produce(node), value.meta.shape[dim % size]
    shift = given["shifts"] % n
    for start, length, to in ((0, n - shift, shift), (n - shift, shift, 0)):
        if length:
            e.builder.emit("copy", [made.like(made.meta.narrow(dim, to, length)), value.like(value.meta.narrow(dim, start, length))])


def _set(e: Emitter, node: fx.Node) -> None:
    """x[:, :, index] = source, with a tensor of indices along the last dimension but one."""
    target, at, source = arguments(node)
    into, new = e.value(target), e.value(source)
    lead = isinstance(at, tuple) and len(at) == into.meta.dim() - 1 and all(i == slice(None) for i in at[:-1]) and isinstance(at[-1], fx.Node)
    if not lead or into.meta.dtype != new.meta.dtype:
        raise Unsupported(node, "it is assigned to another way than by indices of rows")
    index = e.value(at[-1])
    if index.meta.dtype != torch.int64 or index.meta.dim() != 1 or new.meta.shape != (*into.meta.shape[:-2], index.meta.shape[0], into.meta.shape[-1]):
        raise Unsupported(node, "what is assigned has another shape")
    e.builder.emit("write", [into, index, new], (True,))


def _into(e: Emitter, node: fx.Node) -> None:
    target, source = (e.value(n) for n in arguments(node))
    e.values[node] = target
    e.builder.emit("copy", [target, source.like(source.meta.expand(target.meta.shape))])


def _constant(e: Emitter, node: fx.Node) -> None:
    like, values = compat.example_value(node), arguments(node)[0]
    if like.dtype != torch.int64 or not isinstance(values, list | tuple) or not all(isinstance(v, int) for v in values):
        raise Unsupported(node, "a constant that is no list of integers")
    e.values[node] = e.builder.constant(list(values), torch.int64, like.shape)


def _layer_norm(e: Emitter, node: fx.Node) -> None:
    given = dict(zip(("input", "normalized_shape", "weight", "bias", "eps"), arguments(node), strict=False)) | dict(node.kwargs)
    if len(given["normalized_shape"]) != 1:
        raise Unsupported(node, "it normalizes several dimensions")
    x = e.value(given["input"])
    weight, bias = (e.value(given[n]) if given.get(n) is not None else None for n in ("weight", "bias"))
    e.builder.emit("norm", [e.produce(node), None, x, weight, bias, None], (1, e.builder.number(given.get("eps", 1e-5)), e.builder.number(0.0), 0), outputs=2)


def _rms_norm(e: Emitter, node: fx.Node) -> None:
    x, weight, eps, offset, late = arguments(node)
    value = e.value(x)
    args = (0, e.builder.number(eps), e.builder.number(offset), not late)
    e.builder.emit("norm", [e.produce(node), None, value, e.value(weight), None, None], args, outputs=2)


def _glu(e: Emitter, node: fx.Node) -> None:
    gate, up, act = arguments(node)
    a, b = e.value(gate), e.value(up)
    e.builder.emit("glu", [e.produce(node), a, b], (UNARY.index(act),))


def _rotate(e: Emitter, node: fx.Node) -> None:
    x, cos, sin, interleaved = arguments(node)
    like = compat.example_value(node)
    turned = e.value(x)
    if like.shape[-1] % 2:
        raise Unsupported(node, "an odd number of channels")
    angles = [v.like(v.meta.expand(like.shape)) for v in (e.value(cos), e.value(sin))]
    e.builder.emit("rotate", [e.produce(node), turned, *angles, None], (bool(interleaved), False))


def _sparsify(e: Emitter, node: fx.Node) -> None:
    x, threshold, limit = arguments(node)
    value, bound = e.value(x), e.value(threshold)
    rows = rows_of(compat.example_value(x))
    made = e.produce(node)
    if rows is None or 0 <= limit < rows:  # many rows are dense
        e.builder.emit("copy", [made, value])
    else:
        e.builder.emit("binary", [made, value, bound.like(bound.meta.expand(made.meta.shape))], (BINARY.index("above"),))


def _quantize(e: Emitter, node: fx.Node) -> None:
    x = e.contiguous(arguments(node)[0])
    pair = tuple(e.builder.produce(v.shape, v.dtype) for v in compat.example_value(node))
    e.values[node] = pair
    e.builder.emit("quantize", [*pair, x], outputs=2)


def _packed(e: Emitter, node: fx.Node) -> None:
    op = _op(node)
    a8, many = "_a8" in op, op.endswith("_many")
    e.use_kernel(node, kernel_of(node))
    args: list[Any] = list(arguments(node))
    head, args = args[: 2 if a8 else 1], args[2 if a8 else 1 :]
    codes, scale, minimum = args[:3]
    if many:
        bias, bits, group, zero = None, *args[3:6]
        minimum = list(minimum) or [None] * len(codes)
    else:
        bias, _, bits, group, zero = args[3:8]
        codes, scale, minimum = [codes], [scale], [minimum]
    x = e.contiguous(head[0])
    weights: list[Value | None] = []
    sizes: list[int] = []
    total = compat.example_value(node).shape[-1]
    for c, s, low in zip(codes, scale, minimum, strict=True):
        shape, groups = compat.example_value(c).shape, compat.example_value(s).shape
        n = shape[0] * 16 if many else total
        sizes += [n, shape[0], shape[1], groups[1]]
        weights += [e.value(c), e.value(s), None if low is None else e.value(low)]
    half = compat.example_value(scale[0]).dtype == torch.float16
    plan = _plan(op, node)
    prologue = (0, 0, 0, 0, 0, 0)  # see step_fuse
    fields = (len(codes), bits, group, e.builder.number(zero), half, *plan, *prologue, *sizes)
    scales = e.value(head[1]) if a8 else None
    low_bias = None if bias is None else e.value(bias)
    e.builder.emit("packed_a8" if a8 else "packed", [e.produce(node), None, x, scales, low_bias, None, None, None, *weights], fields, outputs=2)


def _plan(op: str, node: fx.Node) -> tuple[int, int, int, int]:
    """unpack_from, rows, tiles, chunk of the configuration that the op itself would run with."""
    read = OPS[op].problem
    assert read is not None
    problem, kernel = read(*fx.node.map_arg(arguments(node), compat.example_value))
    found = provider(op, kernel)
    tuning: Any = found.tuning
    given = tuning.arguments(problem, use.choose(found, problem).config)
    return given["unpack_from"], given.get("rows", 0), given.get("tiles", 0), given.get("chunk", 0)


def _dense(e: Emitter, node: fx.Node) -> None:
    given = dict(zip(("input", "weight", "bias"), arguments(node), strict=False)) | dict(node.kwargs)
    weight = e.value(given["weight"])
    if weight.meta.dim() != 2 or weight.meta.stride(1) != 1 or weight.meta.dtype != compat.example_value(given["input"]).dtype:
        raise Unsupported(node, "its weight is no matrix of dense rows in the dtype of its input")
    x = e.contiguous(given["input"])
    bias = e.value(given["bias"]) if given.get("bias") is not None else None
    e.builder.emit("dense", [e.produce(node), x, weight, bias])


def _attend(e: Emitter, node: fx.Node) -> None:
    q, k, v, mask, *rest = arguments(node)
    *_, scale, kernel = rest
    e.use_kernel(node, plain(kernel))
    values = [e.value(n) for n in (q, k, v)]
    if any(x.meta.stride(-1) != 1 for x in values) or len({x.meta.dtype for x in values}) > 1:
        raise Unsupported(node, "its operands have gaps or differ in dtype")
    masked = None if mask is None else e.value(mask)
    made = e.produce(node)
    if _op(node) == "prompt_attention":  # (B, Q, H, D): heads before queries, as the instruction counts them
        made = made.like(made.meta.transpose(1, 2))
    e.builder.emit("attend", [made, *values, masked], (e.builder.number(scale),))


_OURS: dict[str, _Handler] = {
    "rms_norm": _rms_norm, "glu": _glu, "rotate": _rotate, "quantize_activation": _quantize, "sparsify": _sparsify, "decode_attention": _attend,
    "prompt_attention": _attend, "bipolar_embedding": _packed_embedding, **dict.fromkeys(PACKED, _packed),
}  # fmt: skip
_PLAIN: dict[str, _Handler] = {
    "pow": _pow, "roll": _roll, "setitem": _set, "copy_": _into, "tensor": _constant,
    **dict.fromkeys(("add", "sub", "mul", "div", "add_", "mul_"), _binary),
    **dict.fromkeys((*_UNARY, "gelu"), _unary), **dict.fromkeys(_TRUTHS, _binary),
    "matmul": _outer, "bmm": _outer, "new_ones": _ones, "getitem": _lookup, "argmax": _largest,
    "cat": _cat, "index_copy_": _write,
}  # fmt: skip
