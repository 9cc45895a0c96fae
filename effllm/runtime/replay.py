"""Calls of compiled graphs, recorded and made again without asking Dynamo.

Before every step Dynamo evaluates guards, reads each weight off its module and calls the graph with hundreds of arguments: about a millisecond
a step on a small model. A caller that owns its model, its caches and its inputs knows that nothing else changed and may call the graph itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_here = threading.local()


@dataclass(frozen=True)
class Call:
    """One call of a compiled graph by Dynamo."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    result: Any


def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with its calls seen by `recording`."""

    def call(*args: Any) -> Any:
        result = function(*args)
        calls = getattr(_here, "calls", None)
        if calls is not None:
            calls.append(Call(function, args, result))
        return result

    return call


@contextmanager
def recording() -> Iterator[list[Call]]:
    """The calls of compiled graphs of this thread while the context lasts."""
    before, _here.calls = getattr(_here, "calls", None), []
    try:
        yield _here.calls
    finally:
        _here.calls = before


class Replay:
    """A recorded call with other values for some of its tensors."""

    def __init__(self, call: Call, positions: Sequence[int]) -> None:
        self._call, self._positions = call, tuple(positions)
        self._last: list[Tensor] = [call.args[i] for i in positions]
        self._like = [_form(t) for t in self._last]
        bind = getattr(call.function, "bind", None)
        self._bound: Callable[..., Any] | None = None if bind is None else bind(call.args, self._positions)

    @staticmethod
    def of(calls: Sequence[Call], output: Tensor, changing: Sequence[Tensor]) -> Replay | None:
        """A replay of the one call made, if its first result is what the function returned and the changing tensors went in as they were.

        What else the function did in Python is not repeated: the caller must know that there is nothing.
        """
        if len(calls) != 1 or not isinstance(calls[0].result, tuple | list) or len(calls[0].result) != 1 or calls[0].result[0] is not output:
            return None
        found = []
        for tensor in changing:
            at = [i for i, a in enumerate(calls[0].args) if a is tensor]
            if len(at) != 1:
                return None
            found += at
        return Replay(calls[0], found)

    def __call__(self, *values: Tensor) -> Tensor | None:
        """The first result for other values; None where their shapes, strides or dtypes differ from the recorded ones."""
        if any(v is not k for v, k in zip(values, self._last, strict=False)) or len(values) != len(self._last):
            if [_form(v) for v in values] != self._like:
                return None
            self._last = list(values)
        if self._bound is not None:
            first: Tensor = self._bound(*values)[0]
            return first
        args = list(self._call.args)
        for i, value in zip(self._positions, values, strict=True):
            args[i] = value
        result: Tensor = self._call.function(*args)[0]
        return result

    @property
    def bound(self) -> bool:
        """Whether a replay is nothing but a call of a native program, which neither records gradients nor asks for modes of torch."""
        return self._bound is not None and bool(getattr(self._bound, "native", False))


def _form(t: Tensor) -> tuple[Any, ...]:
    return t.shape, t.stride(), t.dtype
