"""A model's forward pass cut at the head: hidden states out of the body, logits made chunk by chunk, block outputs seen on the way."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from effllm.errors import RecoveryError
from effllm.solvers import blocks
from effllm.solvers.blocks import Batch
from effllm.solvers.statistics import Stop


class Body:
    """Runs a model up to its head, where logits = head(hidden) holds exactly; else up to its logits.

    `head` is the module that makes the logits, None where something follows it (soft caps, scalings): then `__call__` returns the
    logits themselves and `logits` passes them on. `features` are names of blocks whose outputs are kept.
    """

    def __init__(self, model: nn.Module, batch: Batch, features: tuple[str, ...] = ()) -> None:
        self.model, self.features = model, features
        self.extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        self.head_name, self.head, self.shape = self._probe(batch)

    def __call__(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """(hidden states (..., T, d) that enter the head, or logits where there is no head; outputs of the `features`)."""
        seen: dict[str, Tensor] = {}
        caught: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
            caught.append(args[0])
            raise Stop

        with _hooks(self.model, self.features, seen):
            handle = None if self.head is None else self.head.register_forward_pre_hook(stop)
            try:
                caught.append(_logits(self._run(batch)))
            except Stop:
                pass
            finally:
                if handle is not None:
                    handle.remove()
        return caught[0], [seen[name] for name in self.features]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocabulary) of hidden states."""
        return hidden if self.head is None else self.head(hidden)

    def _run(self, batch: Batch) -> Any:
        device = next((t.device for t in (*self.model.parameters(), *self.model.buffers())), torch.device("cpu"))
        if isinstance(batch, Tensor):
            return self.model(batch.to(device), **self.extra)
        kept = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "labels"}
        return self.model(**self.extra | kept)

    @torch.no_grad()
    def _probe(self, batch: Batch) -> tuple[str, nn.Module | None, tuple[int, ...]]:
        """Name and module of the head, and the shape of the logits."""
        last: dict[int, tuple[str, nn.Module, Tensor]] = {}

        def watch(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                plain = isinstance(output, Tensor) and len(args) == 1 and isinstance(args[0], Tensor)
                if plain and (isinstance(getattr(module, "weight", None), Tensor | nn.Module) or hasattr(type(module), "recovery_factors")):
                    last[id(output)] = (name, module, output)  # the output is held: ids stay unique

            return hook

        handles = [m.register_forward_hook(watch(n)) for n, m in self.model.named_modules() if n and _is_leaf(m)]
        try:
            logits = _logits(self._run(batch))
        finally:
            for handle in handles:
                handle.remove()
        name, head, _ = last.get(id(logits), ("", None, None))
        return name, head, tuple(logits.shape)


def _is_leaf(module: nn.Module) -> bool:
    """A module that may be the head: it holds a matrix, and no module but the one of its packed weight."""
    return set(dict(module.named_children())) <= {"weight"}


def _logits(output: Any) -> Tensor:
    found = output.logits if hasattr(output, "logits") else output.get("logits") if isinstance(output, Mapping) else output
    if isinstance(found, tuple | list) and found:
        found = found[0]
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.dim() < 2:
        raise RecoveryError("E-REC-OUTPUT", f"the model returns a {type(output).__name__} without logits", "recover a model whose forward returns logits")
    return found


@contextmanager
def _hooks(model: nn.Module, names: tuple[str, ...], seen: dict[str, Tensor]) -> Iterator[None]:
    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            state = blocks.hidden(output)
            if state is None:
                raise RecoveryError("E-REC-FEATURE", f"{name} returns no tensor", "leave the features out: features=0")
            seen[name] = state

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def block_names(model: nn.Module, count: int | None) -> tuple[str, ...]:
    """Names of `count` blocks, evenly spaced and the last one of each list always among them; None for all, 0 for none.

    Blocks are the members of the model's outermost module lists.
    """
    found: list[str] = []
    for name, members in blocks.lists(model, [n for n, _ in model.named_modules()]).items():
        take = len(members) if count is None else min(count, len(members))
        found += [f"{name}.{(i + 1) * len(members) // take - 1}" for i in range(take)]
    return tuple(found)
