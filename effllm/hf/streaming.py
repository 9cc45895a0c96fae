"""Calibration of a directory's model block by block: dense weights of one block at a time are in memory.

The model is a skeleton on the meta device. `Resident` puts the dense values into its parameters and takes them out again, without
a change of any parameter's identity, so tied ones stay tied. What the blocks are called with is learned in two passes: the first
window runs through the dense blocks, each loaded while it runs; for the others blocks hand their input on, since only the
embedding and what the model makes of positions and masks matters there. That this is so is checked on the first window.

Peak: the packed model, one block (or what lies outside of the blocks: embedding and head), one block's statistics, and one hidden
state per window.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from effllm.solvers import blocks
from effllm.solvers.blocks import Batch, Call, Chain


class Reads(Protocol):
    """Where dense tensors come from."""

    def read(self, name: str) -> Tensor:
        """One tensor by its name."""
        ...


class Resident:
    """Loads a skeleton's parameters and lets them go. `blocks` is the name of the list of blocks; all else is "outside"."""

    def __init__(self, model: nn.Module, reader: Reads, source: dict[str, str], dtype: torch.dtype, blocks: str) -> None:
        self.model, self.reader, self.source, self.dtype, self.blocks = model, reader, source, dtype, blocks
        self._held: list[tuple[nn.Parameter, nn.Parameter]] = []  # a parameter that has its dense values, and its empty double
        # a constructor computes some parameters (norms of ones): small, and final at once
        for name, p in {id(p): (n, p) for n, p in model.named_parameters() if not p.is_meta}.values():
            torch.utils.swap_tensors(p, self._dense(name))

    def load(self, prefix: str) -> None:
        """Dense values for the parameters of one block; for an empty prefix for those outside of all blocks."""
        loaded = set[int]()
        for name, p in self.model.named_parameters(remove_duplicate=False):
            mine = name.startswith(f"{prefix}.") if prefix else not name.startswith(f"{self.blocks}.")
            if mine and p.is_meta and id(p) not in loaded:
                loaded.add(id(p))
                double = self._dense(name)
                torch.utils.swap_tensors(p, double)
                self._held.append((p, double))

    def _dense(self, name: str) -> nn.Parameter:
        return nn.Parameter(self.reader.read(self.source.get(name, name)).to(self.dtype), requires_grad=False)

    def release(self, keep: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        """Empty the parameters that were loaded, but for those of these ids."""
        for p, double in self._held:
            if id(p) not in keep:
                torch.utils.swap_tensors(p, double)
        self._held.clear()

    @contextmanager
    def around(self, prefix: str) -> Iterator[None]:
        """The dense values are there inside. A block keeps what was not packed meanwhile: it belongs to the final model."""
        self.load(prefix)
        try:
            yield
        finally:
            self.release({id(p) for p in self.model.get_submodule(prefix).parameters()} if prefix else set())


@torch.no_grad()
def capture(model: nn.Module, members: nn.ModuleList, inputs: list[Batch], resident: Resident) -> Chain | str:
    """What each block is called with on each input, or the reason why that cannot be found out without the whole dense model."""
    resident.load("")
    try:
        with _visited(members, resident) as forms:
            first = blocks.chain(model, members, inputs[:1])
        if first is None:
            return "its blocks do not form a chain"
        if "other" in forms:
            return "its blocks return more than a hidden state"
        with _handing_on(members, first.place, forms):
            found = blocks.chain(model, members, inputs)
        if found is None or found.place != first.place or not all(_same(a[0], b[0]) for a, b in zip(first.calls, found.calls, strict=True)):
            return "what its blocks are called with depends on what blocks before them give"
        return found
    finally:
        resident.release()


@contextmanager
def _visited(members: nn.ModuleList, resident: Resident) -> Iterator[list[str]]:
    """Each block but the last has its dense values while it runs; the forms of the blocks' outputs are collected."""
    forms: list[str] = []
    outside = list(resident._held)

    def before(i: int) -> Any:
        def hook(_: nn.Module, __: Any) -> None:
            resident._held = []
            resident.load(f"{resident.blocks}.{i}")

        return hook

    def after(_: nn.Module, __: Any, output: Any) -> None:
        resident.release()
        resident._held = list(outside)
        single = isinstance(output, tuple) and len(output) == 1 and isinstance(output[0], Tensor)
        forms.append("tensor" if isinstance(output, Tensor) else "tuple" if single else "other")

    handles: list[Any] = []
    for i, member in enumerate(list(members)[:-1]):
        handles += [member.register_forward_pre_hook(before(i)), member.register_forward_hook(after)]
    try:
        yield forms
    finally:
        for handle in handles:
            handle.remove()
        if len(resident._held) != len(outside) or any(a[0] is not b[0] for a, b in zip(resident._held, outside, strict=True)):
            resident.release()  # a block failed while it was loaded
            resident._held = outside


@contextmanager
def _handing_on(members: nn.ModuleList, place: int | str, forms: list[str]) -> Iterator[None]:
    """Blocks that return their input in the form of their output."""

    def stub(form: str) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            x: Tensor = args[place] if isinstance(place, int) else kwargs[place]
            return (x.clone(),) if form == "tuple" else x.clone()

        return forward

    stubs = list(zip(list(members)[:-1], forms, strict=True))
    for member, form in stubs:
        member.forward = stub(form)
    try:
        yield
    finally:
        for member, _ in stubs:
            del member.forward


def _same(a: Call, b: Call) -> bool:
    """Whether two calls have the same arguments."""
    left, form = pytree.tree_flatten((a.args, a.kwargs))
    right, other = pytree.tree_flatten((b.args, b.kwargs))
    return form == other and all(_equal(x, y) for x, y in zip(left, right, strict=True))


def _equal(x: Any, y: Any) -> bool:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return x.dtype == y.dtype and torch.equal(x, y)
    plain = (bool, int, float, str, type(None))
    return x == y if isinstance(x, plain) and isinstance(y, plain) else type(x) is type(y)
