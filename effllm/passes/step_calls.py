"""Ops that have no instruction of their own in a step program: calls of the native op that their provider runs.

The provider is run on tensors without values (fake ones); what it calls of the same build of the kernels becomes an instruction "call", views
become views, copies become copies. Anything else is Unsupported: the program would have to go back to Python.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from effllm import compat
from effllm.lowering.bipolar_linear import plain
from effllm.lowering.step_code import BINARY, DIMS, Value
from effllm.lowering.step_parts import KINDS
from effllm.passes.match import arguments
from effllm.passes.step_views import Unsupported

if TYPE_CHECKING:
    from effllm.passes.step_nodes import Emitter

# kinds of arguments in kernels/cpu/calls.h
_NONE, _TENSOR, _MAYBE, _TENSORS, _INTEGER, _REAL, _TRUTH, _TEXT, _INTEGERS, _DTYPE = range(10)
_DTYPES = {
    torch.uint8: 0, torch.int8: 1, torch.int16: 2, torch.int32: 3, torch.int64: 4, torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bool: 11,
    torch.bfloat16: 15,
}  # fmt: skip
_PLAIN = [["aten", n] for n in ("cat", "add", "empty_like", "index_copy")]  # what providers do around their kernels
_COPIES = ("aten.clone", "aten.contiguous")
_VIEWS = (
    "view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "transpose", "t", "permute", "expand", "select", "slice", "alias", "detach", "unbind", "split",
)  # fmt: skip


def emit_call(e: Emitter, node: fx.Node) -> None:
    """The instructions of an op of ours by what its provider calls. Raises Unsupported."""
    e.use_kernel(node, "-".join(plain(arguments(node)[-1]).split("-")[:2]))  # a build of the kernels, without what it is for
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes:
        recorder = _Recorder(e, node, fakes)
        given = fx.node.map_arg(tuple(node.args), recorder.stand_in)
        named = fx.node.map_arg(dict(node.kwargs), recorder.stand_in)
        with torch.no_grad(), recorder:
            found = node.target(*given, **named)  # type: ignore[operator]
    e.values[node] = _mapped(found, recorder)


def _mapped(found: Any, recorder: _Recorder) -> Any:
    if isinstance(found, tuple | list):
        return tuple(_mapped(f, recorder) for f in found)
    return None if found is None else recorder.value(found)


class _Recorder(TorchDispatchMode):
    """Sees what a provider calls, and emits it."""

    def __init__(self, emitter: Emitter, node: fx.Node, fakes: FakeTensorMode) -> None:
        super().__init__()
        self.emitter, self.node, self.fakes = emitter, node, fakes
        self.known: dict[int, tuple[Tensor, Value]] = {}  # by id, with the tensor, so that no other one gets its id

    def stand_in(self, node: fx.Node) -> Any:
        """A tensor without values for a node's, laid out as the program has it."""
        with _disable_current_modes():
            value = self.emitter.value(node)
        return self.remember(value)

    def remember(self, value: Value) -> Tensor:
        """A fake tensor for a value of the program."""
        with _disable_current_modes():
            shape, stride, dtype = value.meta.shape, value.meta.stride(), value.meta.dtype
        with self.fakes:
            made = torch.empty_strided(shape, stride, dtype=dtype)
        self.known[id(made)] = (made, value)
        return made

    def value(self, tensor: Tensor) -> Value:
        """The program's value of a fake tensor."""
        found = self.known.get(id(tensor))
        if found is None:
            raise Unsupported(self.node, "its kernel makes a tensor that the program does not know")
        return found[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func)
        if name.startswith(f"{self.emitter.namespace}."):
            return self._native(func, args, kwargs)
        if any(name.startswith(f"{c}.") for c in _COPIES):
            with _disable_current_modes():
                copied = self.emitter.stored(self.value(args[0]))
            return self.remember(copied)
        if name.startswith("aten.") and name.split(".")[1] in _VIEWS:
            return self._viewed(func, args, kwargs)
        if name.split(".")[:2] in _PLAIN:
            return self._plain(name.split(".")[1], func, args, kwargs)
        if name.startswith(("prim.", "aten.sym_", "aten.is_", "aten.dim")) or not any(isinstance(a, Tensor) for a in args):
            return func(*args, **kwargs)
        raise Unsupported(self.node, f"its kernel uses {name}, which the program does not hold")

    def _viewed(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        source = self.value(args[0])
        with _disable_current_modes():
            made = func(source.meta, *args[1:], **kwargs)
        if isinstance(made, tuple | list):
            return [self.remember(source.like(m)) for m in made]
        return self.remember(source.like(made))

    def _plain(self, name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Columns side by side, their order, a bias."""
        found, builder = func(*args, **kwargs), self.emitter.builder
        with _disable_current_modes():
            made = builder.produce(found.shape, found.dtype)
            if name == "cat":
                at = 0
                for part in args[0]:
                    size = part.shape[-1]
                    if len(args) > 1 and args[1] not in (-1, part.dim() - 1):
                        raise Unsupported(self.node, "its kernel joins other dimensions than the last")
                    builder.emit("copy", [made.like(made.meta.narrow(-1, at, size)), self.value(part)])
                    at += size
            elif name == "index_copy":
                base, dim, index, source = args
                if dim not in (-1, base.dim() - 1):
                    raise Unsupported(self.node, "its kernel orders another dimension than the last")
                # rows of one channel; every channel is written, so what was there before does not matter
                columns, new = made.like(made.meta.unsqueeze(-1)), self.value(source)
                if base.shape[-1] != source.shape[-1] or not source.dtype.is_floating_point:
                    raise Unsupported(self.node, "its kernel writes some of the channels")
                builder.emit("write", [columns, self.value(index), new.like(new.meta.unsqueeze(-1))], (False,))
            elif name == "add":
                x, y = args
                if kwargs or not isinstance(y, Tensor) or not found.dtype.is_floating_point:
                    raise Unsupported(self.node, "its kernel adds more than a bias")
                parts = [v.like(v.meta.expand(found.shape)) for v in (self.value(x), self.value(y))]
                builder.emit("binary", [made, *parts], (BINARY.index("add"),))
        return self.remember(made)

    def _native(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        e, schema = self.emitter, func._schema
        found = func(*args, **kwargs)
        results = [] if found is None else list(found) if isinstance(found, tuple | list) else [found]
        with _disable_current_modes():
            made = [e.builder.produce(r.shape, r.dtype) for r in results]
        operands: list[Value | None] = list(made)
        given = [args[i] if i < len(args) else kwargs.get(a.name, a.default_value) for i, a in enumerate(schema.arguments)]
        changed = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
        for argument, write in zip(given, changed, strict=True):  # the program has to know them as written
            if write and isinstance(argument, Tensor):
                operands.append(self.value(argument))
        written = len(operands)
        code: list[int] = []

        def place(tensor: Tensor) -> list[int]:
            value = self.value(tensor)
            at = next((i for i, v in enumerate(operands) if v is value), len(operands))
            if at == len(operands):
                operands.append(value)
            if value.meta.dim() > DIMS or tensor.dtype not in _DTYPES:
                raise Unsupported(self.node, f"{func} gets {value.meta.dim()} dimensions of {tensor.dtype}")
            if tensor.dtype not in KINDS and (value.meta.storage_offset() or tensor.dtype.itemsize != 1):
                raise Unsupported(self.node, f"{func} gets a view of {tensor.dtype}")
            return [at, _DTYPES[tensor.dtype], value.meta.dim()]

        for argument, about in zip(given, schema.arguments, strict=True):
            code += _encoded(argument, str(about.type), place, self.node)
        name = [ord(c) for c in name_of(func)]
        e.builder.emit("call", operands, [len(made), len(name), *name, len(given), *code], outputs=written)
        outs = [self.remember(m) for m in made]
        return None if found is None else tuple(outs) if isinstance(found, tuple | list) else outs[0]


def name_of(func: Any) -> str:
    """What the library knows the op by."""
    return str(func._schema.name).split("::")[1]


def _encoded(argument: Any, kind: str, place: Any, node: fx.Node) -> list[int]:
    """One argument as integers."""
    if argument is None:
        return [_NONE]
    if isinstance(argument, Tensor):
        return [_MAYBE if kind.startswith("Optional") else _TENSOR, *place(argument)]
    if kind == "List[Tensor]":
        return [_TENSORS, len(argument), *[n for t in argument for n in place(t)]]
    if kind == "bool":
        return [_TRUTH, int(argument)]
    if isinstance(argument, torch.dtype):
        return [_DTYPE, _DTYPES[argument]]
    if kind == "int" and isinstance(argument, int):
        return [_INTEGER, argument]
    if kind == "float":
        return [_REAL, struct.unpack("<q", struct.pack("<d", float(argument)))[0]]
    if kind == "str":
        return [_TEXT, len(argument), *argument.encode("latin-1")]
    if kind == "List[int]":
        return [_INTEGERS, len(argument), *argument]
    raise Unsupported(node, f"an argument of type {kind}")


def callable_op(node: fx.Node) -> bool:
    """Whether a node of ours may become calls: its kernel is of this machine's processor, and its tensors have few dimensions."""
    values = [compat.example_value(n) for n in node.all_input_nodes]
    return all(isinstance(v, Tensor | FakeTensor) and v.dim() <= DIMS and all(isinstance(s, int) for s in v.shape) for v in values)
