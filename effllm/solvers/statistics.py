"""Moments of the inputs of Linear and Conv1D modules, collected by hooks while a model runs.

Modules that read one and the same tensor (query, key and value; gate and up) share one `Moments`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from effllm.solvers.moments import Moments


class Stop(Exception):
    """Ends a forward pass early: everything that was wanted has been seen."""


class Inputs:
    """The inputs that modules have in the dense model, per pass and call. Use as a context manager around forward passes; call
    `begin` before each pass. Modules that read one tensor share one copy of it.

    `tokens`: only inputs with that many rows are kept. Others were routed or reshaped; a compressed model may route its tokens
    otherwise, so their rows would not belong together.
    """

    def __init__(self, linears: dict[str, nn.Module]) -> None:
        self.linears, self.tokens = linears, 0
        self._passes: list[dict[str, list[Tensor | None]]] = []
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Inputs:
        for name, module in self.linears.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._copies.clear()

    def begin(self, tokens: int) -> None:
        """Start the next pass, over a hidden state with `tokens` rows."""
        self.tokens = tokens
        self._passes.append({})
        self._copies.clear()

    def get(self, number: int, name: str, call: int) -> Tensor | None:
        """What the module read in its call number `call` of a pass, or None where that was not kept."""
        calls = self._passes[number].get(name, []) if number < len(self._passes) else []
        return calls[call] if call < len(calls) else None

    def _hook(self, name: str) -> Any:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = _input(args, kwargs)
            copy: Tensor | None = None
            if x.numel() == self.tokens * x.shape[-1]:
                copy = next((c for tensor, c in self._copies if tensor is x), None)
                if copy is None:
                    copy = x.detach().clone()  # the model may go on to change it in place
                    self._copies.append((x, copy))
            self._passes[-1].setdefault(name, []).append(copy)

        return see


class Statistics:
    """Use as a context manager around forward passes; call `begin` before each pass.

    `until_seen` ends a pass with `Stop` once every module was called in it. `dense` holds the inputs of the same passes in the dense
    model; then the moments have `cross`, except for modules whose inputs do not match the dense ones row by row.
    """

    def __init__(self, linears: dict[str, nn.Module], *, until_seen: bool = False, dense: Inputs | None = None) -> None:
        self.linears, self.until_seen, self.dense = linears, until_seen, dense
        self.leader: dict[str, str] = {}
        self._sums: dict[str, Moments] = {}
        self._seen: list[tuple[Tensor, Tensor | None, str]] = []  # this pass: tensors, their dense twins, the leaders that summed them
        self._joined: list[tuple[Tensor, str]] = []  # this pass: tensors and the modules for which a leader summed them
        self._called: dict[str, int] = {}
        self._pass = -1
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Statistics:
        for name, module in self.linears.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._seen.clear()
        self._joined.clear()

    def begin(self) -> None:
        """Forget which tensors the last pass showed."""
        self._pass += 1
        self._seen.clear()
        self._joined.clear()
        self._called.clear()

    def stages(self) -> list[list[str]]:
        """Modules that share an input, in the order in which the inputs appeared."""
        first: dict[str, list[str]] = {}
        for name, leader in self.leader.items():
            first.setdefault(leader, []).append(name)
        return list(first.values())

    def moments(self, name: str) -> Moments | None:
        """The sums over a module's inputs, fp32, or None where it saw none. Modules that share an input share them: read only."""
        return self._sums.get(self.leader.get(name, ""))

    def _hook(self, name: str) -> Any:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = self._called.get(name, 0)
            twin = None if self.dense is None else self.dense.get(self._pass, name, call)
            self._see(name, _input(args, kwargs), twin)
            self._called[name] = call + 1
            if self.until_seen and len(self._called) == len(self.linears):
                raise Stop

        return see

    def _see(self, name: str, x: Tensor, twin: Tensor | None) -> None:
        if twin is not None and twin.shape != x.shape:
            twin = None
        shared = next((leader for tensor, other, leader in self._seen if tensor is x and other is twin), None)
        known = self.leader.get(name)
        if known is None:
            self.leader[name] = known = shared or name
        elif known != name and shared != known:
            # shared so far and not any more: goes on alone from what the two had in common, which leaves out what only the
            # leader saw in this pass
            own = _copy(self._sums[known])
            for tensor, other, leader in self._seen:
                if leader == known and not any(tensor is t and name == n for t, n in self._joined):
                    _add(own, tensor, other, -1)
            self._sums[name] = own
            self.leader[name] = known = name
        if known != name:
            self._joined.append((x, name))
            return
        self._seen.append((x, twin, name))
        total = self._sums.get(name)
        if total is None:
            total = self._sums[name] = _empty(x.shape[-1], x.device, cross=self.dense is not None)
        _add(total, x, twin)


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x: Tensor = args[0] if args else next(iter(kwargs.values()))  # Linear calls it input, Conv1D x
    return x


def _empty(k: int, device: torch.device, *, cross: bool) -> Moments:
    square = torch.zeros(k, k, device=device)
    row = square.new_zeros(k)
    return Moments(square, row, row.clone(), 0, square.clone() if cross else None, dense_total=row.clone() if cross else None)


def _copy(sums: Moments) -> Moments:
    cross, dense = (None if t is None else t.clone() for t in (sums.cross, sums.dense_total))
    return Moments(sums.hessian.clone(), sums.total.clone(), sums.magnitude.clone(), sums.count, cross, dense_total=dense)


def _add(sums: Moments, x: Tensor, twin: Tensor | None, sign: int = 1) -> None:
    """Add (or take off) the inputs x (..., K); without a twin there is no `cross` any more."""
    flat = x.detach().reshape(-1, x.shape[-1]).float()
    sums.hessian.addmm_(flat.t(), flat, alpha=sign)
    sums.total.add_(flat.sum(0), alpha=sign)
    sums.magnitude.add_(flat.abs().sum(0), alpha=sign)
    sums.count += sign * flat.shape[0]
    if twin is None:
        sums.cross = sums.dense_total = None
    elif sums.cross is not None and sums.dense_total is not None:
        other = twin.reshape(flat.shape).float()
        sums.cross.addmm_(other.t(), flat, alpha=sign)
        sums.dense_total.add_(other.sum(0), alpha=sign)
