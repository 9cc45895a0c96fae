"""The stream of hidden states through a model's blocks, per item of data, with linears inside a block answered for by others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from effllm.solvers import blocks
from effllm.solvers.blocks import Batch, Call, Chain
from effllm.solvers.statistics import Statistics, Stop


class Stream:
    """States of all items in front of the next block. `chain` holds the other arguments of each block, of one item where all have the same."""

    def __init__(self, chain: Chain, states: list[Tensor]) -> None:
        self.chain, self.states = chain, states

    def run(self, block: nn.Module, index: int, item: int) -> Tensor | None:
        """Block number `index` on an item's state; None where `Stop` ended it."""
        calls = self.chain.calls[index]
        call = calls[min(item, len(calls) - 1)]
        call.put(self.chain.place, self.states[item])
        try:
            return blocks.hidden(block(*call.args, **call.kwargs))
        except Stop:
            return None


def stream(model: nn.Module, members: nn.ModuleList, items: Sequence[Batch]) -> Stream | None:
    """The stream in front of the first block; None unless the blocks are called once each, in order, each on the last one's output.

    Windows of one length have masks and positions in common: where the first and the last item's calls agree, they are not made for others.
    """
    own = list(items)
    alike = len({tuple(x.shape) if isinstance(x, Tensor) else i for i, x in enumerate(own)}) == 1
    found = blocks.chain(model, members, [own[0], own[-1]] if alike else own)
    if found is None:
        return None
    if alike and not _agree(found):
        found = blocks.chain(model, members, own)
        assert found is not None
    elif alike:
        found.calls = [calls[:1] for calls in found.calls]
    states = [_first(model, members[0], item, found.place) for item in own]
    return Stream(found, states)


def _agree(chain: Chain) -> bool:
    """Whether the calls of two items have the same arguments beside the stream."""
    return all(_same(a.args, b.args, chain.place) and _same(a.kwargs, b.kwargs, chain.place) for a, b in chain.calls)


def _same(a: Any, b: Any, place: int | str | None = None) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(i == place or _same(x, y) for i, (x, y) in enumerate(zip(a, b, strict=True)))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(key == place or _same(value, b[key]) for key, value in a.items())
    return a is b or (type(a) is type(b) and bool(a == b))


def _first(model: nn.Module, block: nn.Module, item: Batch, place: int | str) -> Tensor:
    """What the first block reads."""
    seen: list[Call] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(Call(list(args), dict(kwargs)))
        raise Stop

    handle = block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        blocks.run(model, item)
    finally:
        handle.remove()
    state = seen[0].args[place] if isinstance(place, int) else seen[0].kwargs[place]
    assert isinstance(state, Tensor)
    return state


def stages(linears: dict[str, nn.Module], run: Callable[[], Any], rows: int) -> list[list[str]]:
    """Names of the linears that `run` calls just once and with `rows` inputs, by shared input, in order of execution."""
    seen: dict[str, list[int]] = {n: [] for n in linears}

    def see(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            seen[name].append(output.numel() // output.shape[-1])

        return hook

    handles = [m.register_forward_hook(see(n)) for n, m in linears.items()]
    try:
        with Statistics(linears) as statistics:
            statistics.begin()
            run()
    finally:
        for handle in handles:
            handle.remove()
    found = [[n for n in stage if seen[n] == [rows]] for stage in statistics.stages()]
    return [stage for stage in found if stage]


@contextmanager
def replaced(modules: Mapping[str, nn.Module], answer: Callable[[str, Callable[[Tensor], Tensor], Tensor], Tensor]) -> Iterator[None]:
    """Inside, a module's output is `answer(name, own forward, input)`."""
    before = {n: m.__dict__.get("forward") for n, m in modules.items()}
    for name, module in modules.items():
        module.forward = partial(_call, partial(answer, name, module.forward))  # type: ignore[method-assign]
    try:
        yield
    finally:
        for name, module in modules.items():
            old = before[name]
            if old is None:
                del module.__dict__["forward"]
            else:
                module.forward = old  # type: ignore[method-assign]


def _call(answer: Callable[[Tensor], Tensor], *args: Tensor, **kwargs: Tensor) -> Tensor:
    """Linear calls its argument input, Conv1D x, and some code names it."""
    return answer(args[0] if args else next(iter(kwargs.values())))
