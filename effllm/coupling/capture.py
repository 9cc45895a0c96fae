"""The graph of a whole model in aten operators, with the names of the tensors it owns."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from effllm.errors import CouplingError


@dataclass
class Captured:
    """A graph; which placeholder is which tensor of the model (one name for tied ones); every name of each; names missing from checkpoints."""

    graph: fx.Graph
    owned: dict[fx.Node, str]
    tensors: dict[str, Tensor]
    aliases: dict[str, str]
    volatile: set[str] = field(default_factory=set)


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers under every name they have."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


class _Only(nn.Module):
    """A model of whose output one field matters."""

    def __init__(self, inner: nn.Module, field_name: str) -> None:
        super().__init__()
        self.inner = inner
        self.field_name = field_name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The field of the inner model's output."""
        return getattr(self.inner(*args, **kwargs), self.field_name)


def capture(model: nn.Module, inputs: Any, output: str | None = None) -> Captured:
    """Trace `model(*inputs)` (or `model(**inputs)` for a dict) without running it on data; with `output`, only that field of the result.

    Raises CouplingError E-CPL-CAPTURE where torch.export cannot trace it.
    """
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,) if isinstance(inputs, Tensor) else tuple(inputs), {})
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = model if output is None else _Only(model, output).train(model.training)
            program = torch.export.export(traced, args, kwargs, strict=False)
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        step = "pass inputs that it runs on, and output=... where only one field of the result matters"
        raise CouplingError("E-CPL-CAPTURE", f"the model cannot be traced: {first}", step) from error
    named = named_tensors(model)
    first_name: dict[int, str] = {}
    for name, tensor in named:
        first_name.setdefault(id(tensor), name)
    aliases = {name: first_name[id(tensor)] for name, tensor in named}
    signature = program.graph_signature
    names = {k: v if output is None else v.removeprefix("inner.") for k, v in {**signature.inputs_to_parameters, **signature.inputs_to_buffers}.items()}
    owned = {n: aliases[names[n.name]] for n in program.graph.nodes if n.op == "placeholder" and names.get(n.name) in aliases}
    tensors = {name: tensor for name, tensor in named if aliases[name] == name}
    kept = set(model.state_dict(keep_vars=True))
    return Captured(program.graph, owned, tensors, aliases, {n for n in tensors if n not in kept})
