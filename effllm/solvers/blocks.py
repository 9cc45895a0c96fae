"""Find a model's lists of blocks and what each block is called with, so that a block can be run by itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effllm.errors import CalibrationError
from effllm.solvers.statistics import Stop

Batch = Tensor | Mapping[str, Any]


@dataclass
class Call:
    """The arguments of one call of a block."""

    args: list[Any]
    kwargs: dict[str, Any]

    def place(self, tensor: Tensor) -> int | str | None:
        """Where `tensor` itself is among the arguments."""
        named: list[tuple[int | str, Any]] = [*enumerate(self.args), *self.kwargs.items()]
        return next((key for key, value in named if value is tensor), None)

    def put(self, place: int | str, tensor: Tensor) -> None:
        """Replace one argument."""
        if isinstance(place, int):
            self.args[place] = tensor
        else:
            self.kwargs[place] = tensor

    def rows(self, place: int | str) -> int:
        """Rows of the hidden state (..., hidden) at `place`, or else of the first floating-point argument."""
        named: list[tuple[int | str, Any]] = [*enumerate(self.args), *self.kwargs.items()]
        values = [value for key, value in named if key == place] + [value for _, value in named]
        found = next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)
        return 0 if found is None else found.numel() // found.shape[-1]


@dataclass
class Chain:
    """Calls of every block (blocks, batches) of a list in which each block's output is the next one's argument `place`."""

    calls: list[list[Call]]
    place: int | str


def batches(calibration: Any) -> list[Batch]:
    """Model inputs, one per forward pass, from token windows (windows, length) or an iterable of tensors or dicts.

    CalibrationError: E-CAL-SHORT where there is nothing to run, E-CAL-FORM where the form is unknown.
    """
    if isinstance(calibration, Tensor):
        if calibration.dim() != 2 or calibration.is_floating_point():
            raise CalibrationError("E-CAL-FORM", f"a {calibration.dtype} tensor of shape {tuple(calibration.shape)}", "pass token ids (windows, length)")
        found: list[Batch] = [row.unsqueeze(0) for row in calibration] if calibration.numel() else []
    elif isinstance(calibration, str | Mapping) or not isinstance(calibration, Iterable):
        raise CalibrationError("E-CAL-FORM", f"calibration is a {type(calibration).__name__}", "pass token ids (windows, length) or a list of model inputs")
    else:
        found = list(calibration)
    for item in found:
        if not isinstance(item, Tensor | Mapping):
            raise CalibrationError("E-CAL-FORM", f"a model input is a {type(item).__name__}", "pass tensors, or dicts of keyword arguments")
    if not found:
        raise CalibrationError("E-CAL-SHORT", "the calibration data has no window", "give a longer text, or shorter windows")
    return found


def first(data: list[Batch], tokens: int) -> list[Batch]:
    """The first windows, cut to so many tokens in all; dicts are taken whole."""
    out: list[Batch] = []
    for batch in data:
        if tokens <= 0:
            break
        own = batch[..., :tokens] if isinstance(batch, Tensor) and batch.dim() == 2 else batch
        out.append(own)
        tokens -= own.numel() if isinstance(own, Tensor) else 512
    return out


def check_ids(model: nn.Module, found: Iterable[Batch]) -> None:
    """Raise CalibrationError (E-CAL-VOCAB) where token ids lie outside of the model's embedding: they are of another model's tokenizer."""
    get = getattr(model, "get_input_embeddings", None)
    count = int(getattr(get() if callable(get) else None, "num_embeddings", 0))
    for item in found if count else ():
        ids = item if isinstance(item, Tensor) else item.get("input_ids")
        if not isinstance(ids, Tensor) or ids.is_floating_point() or not ids.numel():
            continue
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= count:
            cause = f"the calibration data has the token {low if low < 0 else high}, and the model's vocabulary has {count}"
            raise CalibrationError("E-CAL-VOCAB", cause, "tokenize the text with the tokenizer of this model")


def run(model: nn.Module, batch: Batch, call: Callable[..., Any] | None = None) -> None:
    """One forward pass without a cache; `Stop` raised by a hook ends it early. `call` is called in the model's place, where given."""
    # parameters on meta: a skeleton whose blocks are loaded one after another
    device = next((t.device for t in (*model.parameters(), *model.buffers()) if not t.is_meta), torch.device("cpu"))
    extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    try:
        if isinstance(batch, Tensor):
            (call or model)(batch.to(device), **extra)
        else:
            (call or model)(**extra | {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    except Stop:
        return


def lists(model: nn.Module, covered: Iterable[str]) -> dict[str, nn.ModuleList]:
    """Outermost ModuleLists whose elements hold covered modules, by name in the order of the model."""
    names, found = list(covered), dict[str, nn.ModuleList]()
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer in found)
        if isinstance(module, nn.ModuleList) and not inside and any(_depth(n, name) > 1 for n in names):
            found[name] = module
    return found


def _depth(name: str, parent: str) -> int:
    return name[len(parent) + 1 :].count(".") + 1 if name.startswith(parent + ".") else 0


def chain(model: nn.Module, blocks: nn.ModuleList, inputs: list[Batch]) -> Chain | None:
    """What each block is called with; None unless the blocks are called once each, in order, each on the last one's output."""
    members = list(blocks)
    if len({id(b) for b in members}) != len(members):
        return None
    order: list[int] = []
    results: dict[int, Tensor | None] = {}
    calls: list[list[Call]] = [[] for _ in members]
    places: set[int | str | None] = set()

    def before(i: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = Call(list(args), dict(kwargs))
            order.append(i)
            last = results.pop(i - 1, None)
            if i > 0:
                place = None if last is None else call.place(last)
                places.add(place)
                if place is not None:
                    call.put(place, torch.empty(0))  # comes from the block before; not held here
            calls[i].append(call)
            if i == len(members) - 1:
                raise Stop

        return hook

    def after(i: int) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            results[i] = hidden(output)

        return hook

    handles = [b.register_forward_pre_hook(before(i), with_kwargs=True) for i, b in enumerate(members)]
    handles += [b.register_forward_hook(after(i)) for i, b in enumerate(members)]
    try:
        for batch in inputs:
            run(model, batch)
            results.clear()
    finally:
        for handle in handles:
            handle.remove()
    if order != list(range(len(members))) * len(inputs):
        return None
    if len(members) == 1:
        return Chain(calls, 0)
    place = places.pop() if len(places) == 1 else None
    return None if place is None else Chain(calls, place)


def hidden(output: Any) -> Tensor | None:
    """The hidden state in a block's output."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None
