"""Finds the packed tensors of a weight at call time.

Dynamo reuses one compiled graph for several module instances and does not notice re-assignment, `load_state_dict` or in-place
updates, so packed numbers must not be baked into a graph. They are inputs, looked up by identity and version of the original
parameters. Packs are made once per (parameter version, parameters of the format, layout) and shared by all graphs.

Limits: writing through `.data` does not raise the version (call `effllm.refresh`), and inference tensors have no version at all
(they are treated as frozen).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effllm import compat
from effllm.errors import OptionError
from effllm.methods import Method
from effllm.runtime import pages
from effllm.runtime.formats.base import Packed
from effllm.runtime.weights import kind_of

Solver = Callable[[Tensor, Method], Packed]


class Want(NamedTuple):
    """One packed weight of a graph: the input it is made of, how, in which layout, and which of its tensors the graph takes.

    `transposed` is for weights that are held as (in, out).
    """

    position: int
    params: Method
    layout: str
    names: tuple[str, ...]
    transposed: bool = False


_Form = tuple[Method, bool]  # parameters, and whether the weight is (in, out)


class _Entry:
    """Packs of one parameter at one version."""

    def __init__(self, ref: weakref.ref[Tensor], version: int) -> None:
        self.ref, self.version = ref, version
        self.resolved: dict[_Form, _Form] = {}  # as asked -> with the offset that "auto" came to
        self.shapes: dict[_Form, Packed] = {}  # on meta
        self.layouts: dict[_Form, dict[str, dict[str, Tensor]]] = {}
        self.canonical: dict[_Form, Packed] = {}  # what was solved, until a kernel's layout is made of it


class PackStore:
    """Packs of parameters that are alive, by identity; an entry goes with its parameter."""

    def __init__(self, solver: Solver) -> None:
        self._solver = solver
        self._entries: dict[int, _Entry] = {}
        self._lock = threading.RLock()
        self.generation = 0  # rises whenever a known parameter dies or is refreshed: an id may be reused
        self.packs = 0

    def _entry(self, weight: Tensor) -> _Entry:
        key = id(weight)
        entry = self._entries.get(key)
        if entry is None or entry.ref() is not weight or entry.version != compat.version(weight):
            if entry is not None and entry.ref() is not weight:
                self.generation += 1
            entry = _Entry(weakref.ref(weight, lambda _, k=key: self._drop(k)), compat.version(weight))  # type: ignore[misc]
            self._entries[key] = entry
        return entry

    def _drop(self, key: int) -> None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.ref() is None:
                del self._entries[key]
            self.generation += 1

    def describe(self, weight: Tensor, params: Method, *, transposed: bool = False) -> Packed:
        """Shapes and attributes of the packed weight (on meta). Solves it, once per version and parameters."""
        asked = (params.stored_as(), transposed)
        with self._lock, torch.no_grad():
            entry = self._entry(weight)
            if asked not in entry.resolved:
                packed = self._solver(weight.detach().t().contiguous() if transposed else weight.detach(), asked[0])
                self.packs += 1
                resolved = (asked[0].resolved(packed.attrs), transposed)
                entry.resolved[asked] = entry.resolved[resolved] = resolved
                entry.shapes[resolved] = packed.to("meta")
                entry.layouts[resolved] = {}
                entry.canonical[resolved] = packed
            return entry.shapes[entry.resolved[asked]]

    def tensors(self, weight: Tensor, params: Method, layout: str, *, transposed: bool = False) -> dict[str, Tensor]:
        """The packed weight in a kernel's layout."""
        with self._lock, torch.no_grad():
            shape = self.describe(weight, params, transposed=transposed)
            entry = self._entry(weight)
            resolved = entry.resolved[params.stored_as(), transposed]
            have = entry.layouts[resolved]
            if layout not in have:
                kind = kind_of(shape.format)
                packed = entry.canonical.pop(resolved, None)
                if packed is None:
                    source = next(iter(have))
                    packed = kind.restore(shape, have[source], source)
                have[layout] = {name: pages.place(t) for name, t in kind.arrange(packed, layout).items()}
            return have[layout]

    def refresh(self, model: nn.Module) -> int:
        """Forget the packs of a model's parameters, for writes that raise no version (`.data`). Returns how many there were."""
        with self._lock:
            count = sum(self._entries.pop(id(p), None) is not None for p in model.parameters())
            self.generation += 1
            return count


class Binding:
    """One compiled graph's lookups: positions of the original weights among its inputs, and what each is packed to.

    mode "checked": identity and version of every weight at every call. "frozen": looked up at the first call only.
    """

    def __init__(self, store: PackStore, wants: Sequence[Want], mode: str) -> None:
        if mode not in ("checked", "frozen"):
            raise OptionError("E-OPT-VALUE", f"weights={mode!r}", 'weights is "checked" or "frozen"')
        self._store, self._wants, self._frozen = store, wants, mode == "frozen"
        self._index = tuple(dict.fromkeys(w.position for w in wants))
        self._table: dict[tuple[Any, ...], list[Tensor]] = {}
        self._generation = store.generation
        self._once: list[Tensor] | None = None

    def __call__(self, args: Sequence[Any]) -> list[Tensor]:
        """The packed tensors, in the order of the placeholders that were added."""
        if self._once is not None:
            return self._once
        if self._generation != self._store.generation:
            self._table.clear()
            self._generation = self._store.generation
        key = tuple([(id(args[i]), compat.version(args[i])) for i in self._index])
        found = self._table.get(key)
        if found is None:
            found = []
            for w in self._wants:
                tensors = self._store.tensors(args[w.position], w.params, w.layout, transposed=w.transposed)
                found += [tensors[name] for name in w.names]
            if self._generation != self._store.generation:  # a lookup replaced an entry whose id was reused
                self._table.clear()
                self._generation = self._store.generation
            self._table[key] = found
        if self._frozen:
            self._once = found
        return found
