"""H = sum x x^T of the inputs of Linear and Conv1D modules, collected by hooks while a model runs.

Modules that read one and the same tensor (query, key and value; gate and up) share one H.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Stop(Exception):
    """Ends a forward pass early: everything that was wanted has been seen."""


class Statistics:
    """Use as a context manager around forward passes; call `begin` before each pass.

    `until_seen` ends a pass with `Stop` once every module was called in it.
    """

    def __init__(self, linears: dict[str, nn.Module], *, until_seen: bool = False) -> None:
        self.linears, self.until_seen = linears, until_seen
        self.leader: dict[str, str] = {}
        self._sums: dict[str, Tensor] = {}
        self._seen: list[tuple[Tensor, str]] = []  # this pass: tensors and the leaders that summed them
        self._joined: list[tuple[Tensor, str]] = []  # this pass: tensors and the modules for which a leader summed them
        self._called: set[str] = set()
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
        self._seen.clear()
        self._joined.clear()
        self._called.clear()

    def stages(self) -> list[list[str]]:
        """Modules that share an input, in the order in which the inputs appeared."""
        first: dict[str, list[str]] = {}
        for name, leader in self.leader.items():
            first.setdefault(leader, []).append(name)
        return list(first.values())

    def hessian(self, name: str) -> Tensor | None:
        """H (K, K) fp32 of a module, or None where it saw no input."""
        return self._sums.get(self.leader.get(name, ""))

    def _hook(self, name: str) -> Any:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = args[0] if args else next(iter(kwargs.values()))  # Linear calls it input, Conv1D x
            self._see(name, x)
            self._called.add(name)
            if self.until_seen and len(self._called) == len(self.linears):
                raise Stop

        return see

    def _see(self, name: str, x: Tensor) -> None:
        shared = next((leader for tensor, leader in self._seen if tensor is x), None)
        known = self.leader.get(name)
        if known is None:
            self.leader[name] = known = shared or name
        elif known != name and shared != known:
            # shared so far and not any more: goes on alone from what the two had in common, which leaves out what only the
            # leader saw in this pass
            own = self._sums[known].clone()
            for tensor, leader in self._seen:
                if leader == known and not any(tensor is t and name == n for t, n in self._joined):
                    own.addmm_(*_factors(tensor), alpha=-1)
            self._sums[name] = own
            self.leader[name] = known = name
        if known != name:
            self._joined.append((x, name))
            return
        self._seen.append((x, name))
        total = self._sums.get(name)
        if total is None:
            total = self._sums[name] = torch.zeros(x.shape[-1], x.shape[-1], device=x.device)
        total.addmm_(*_factors(x))


def _factors(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., K) as (K, tokens) and (tokens, K), fp32."""
    flat = x.detach().reshape(-1, x.shape[-1]).float()
    return flat.t(), flat
