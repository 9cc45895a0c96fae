"""Graph nodes as a step program: values, their views, and the instructions that make them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from effllm import compat
from effllm.errors import EffllmError
from effllm.lowering.step_code import Builder, Code, Value
from effllm.lowering.step_parts import RANGE
from effllm.passes.match import arguments, cast, name
from effllm.passes.step_handlers import fits, handler
from effllm.passes.step_views import MAYBE, Unsupported, applied, views


class Emitter:
    """Makes the instructions of nodes, in their order; values that no emitted node made become inputs."""

    def __init__(self, graph: fx.Graph) -> None:
        self.builder = Builder()
        self.values: dict[fx.Node, Any] = {}
        self.inputs: list[fx.Node] = []
        self.kernel = ""
        self._graph = graph

    @staticmethod
    def holds(node: fx.Node) -> bool:
        """Whether there is an instruction for a node, by its operation and dtypes."""
        make = handler(node)
        return make is not None and fits(node)

    def emit(self, node: fx.Node) -> None:
        """Append a node's instructions. Raises Unsupported."""
        make = handler(node)
        if make is None:
            raise Unsupported(node, f"{node.target} has no instruction")
        self.builder.label = compat.module_of(node)[0]
        try:
            make(self, node)
        except (EffllmError, RuntimeError) as error:
            raise Unsupported(node, str(error)) from error

    def finish(self, wanted: list[fx.Node]) -> Code:
        """The program that gives these nodes' values."""
        given: list[Value] = []
        for n in wanted:
            value = self.value(n)
            if not value.meta.is_contiguous() or value.meta.numel() != value.buffer.numel or any(value.buffer is v.buffer for v in given):
                value = self.stored(value)
            given.append(value)
        return self.builder.finish(given)

    def stored(self, value: Value) -> Value:
        """A contiguous copy."""
        made = self.builder.produce(value.meta.shape, value.meta.dtype)
        self.builder.emit("copy", [made, value])
        return made

    @property
    def namespace(self) -> str:
        """Of the torch ops that run the program."""
        return f"effllm_cpu_{self.kernel.removeprefix('cpu-')}"

    def value(self, node: fx.Node, ranges: bool = False) -> Value:
        """A node's value: made here, a view of one, or an input; stored, unless the instruction takes `ranges`."""
        found = self.values.get(node)
        if found is None:
            if views(node):
                base = arguments(node)[0]
                assert isinstance(base, fx.Node)
                found = self._view(node, base)
            else:
                meta = compat.example_value(node)
                if not isinstance(meta, Tensor):
                    raise Unsupported(node, "it is no tensor")
                found = self.builder.external(meta)
                self.inputs.append(node)
            self.values[node] = found
        if not isinstance(found, Value):
            raise Unsupported(node, "it holds several values")
        if found.buffer.slot == RANGE and not ranges:
            found = self.values[node] = self.stored(found)
        return found

    def _view(self, node: fx.Node, base: fx.Node) -> Any:
        if base not in self.values and (views(base) or not isinstance(compat.example_value(base), tuple | list)):
            if isinstance(compat.example_value(base), tuple | list):
                source = base.args[0]
                assert isinstance(source, fx.Node)
                self.values[base] = self._view(base, source)
            else:
                self.value(base, ranges=True)
        have = self.values.get(base)
        if isinstance(have, tuple | list):
            return have[arguments(node)[1]]
        if have is None:
            raise Unsupported(node, f"{base.name} is no tensor")
        if name(node) == "dropout" or (cast(node) is not None and name(node) not in MAYBE):
            return have
        try:
            made = applied(node, have.meta)
        except RuntimeError:  # a view of what the graph stores without gaps and the program does not
            have = self.stored(have)
            made = applied(node, have.meta)
        if isinstance(made, tuple | list):
            return tuple(have.like(m) for m in made)
        if not made._is_view() and name(node) in MAYBE and not have.meta.is_contiguous():
            # a view of what the graph has, a copy of what was made here: an attention of several queries may have its heads elsewhere
            whole = self.stored(have)
            return whole.like(applied(node, whole.meta))
        return have.like(made)

    def produce(self, node: fx.Node) -> Value:
        """A contiguous buffer for a node's value."""
        like = compat.example_value(node)
        self.values[node] = made = self.builder.produce(like.shape, like.dtype)
        return made

    def contiguous(self, node: fx.Node) -> Value:
        """A node's value without gaps; copied where it has some."""
        value = self.value(node)
        return value if value.meta.is_contiguous() else self.stored(value)

    def use_kernel(self, node: fx.Node, kernel: str) -> None:
        """All nodes must name one kernel."""
        if self.kernel not in ("", kernel):
            raise Unsupported(node, f"it is for {kernel}, others are for {self.kernel}")
        self.kernel = kernel
