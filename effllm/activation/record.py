"""Runs calibration data through a model's graph with recording nodes in it.

The graph is Dynamo's, of the model as it is (dense, or packed already), so what is recorded is what the rewritten model computes, and
sites are found by how data flow (passes/roles.py), not by the names of a model family.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from effllm import compat
from effllm.errors import CalibrationError
from effllm.passes.roles import Roles, roles
from effllm.solvers import blocks
from effllm.solvers.activation import Histogram
from effllm.solvers.blocks import Batch

SINKS = 0.01  # share of the first tokens of a window that is left out: attention sinks have activations of another size
Seen = Callable[[Tensor], None]


class Recorder(nn.Module):
    """Shows a value (..., C) as tokens (T, C) to a function, the first tokens of each sequence left out."""

    def __init__(self, see: Seen) -> None:
        super().__init__()
        self.see = see

    def forward(self, x: Tensor) -> None:
        """Record."""
        rows = x.unsqueeze(0) if x.dim() == 2 else x
        if x.dim() >= 3:
            rows = rows[..., math.ceil(SINKS * x.shape[-2]) :, :]
        self.see(rows.reshape(-1, x.shape[-1]))


@dataclass
class Moment:
    """Sums of squares (C,) fp64 over `count` tokens."""

    square: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    count: int = 0

    def add(self, x: Tensor) -> None:
        """Count tokens (T, C)."""
        own = x.double().square().sum(0).cpu()
        self.square = own if self.count == 0 else self.square + own
        self.count += x.shape[0]


Place = Callable[[Roles], Sequence[tuple[fx.Node, Seen]]]


@torch.no_grad()
def through(model: nn.Module, inputs: list[Batch], place: Place) -> None:
    """Run inputs through the model; `place` says for each of its graphs which nodes are shown to whom.

    Raises CalibrationError (E-CAL-GRAPH) where the model cannot be captured in one graph.
    """

    def recording(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        copy = compat.copy_graph(gm)[0]
        for i, (node, see) in enumerate(place(roles(copy.graph))):
            copy.add_submodule(f"record_{i}", Recorder(see))
            with copy.graph.inserting_after(node):
                copy.graph.call_module(f"record_{i}", (node,))
        copy.graph.lint()
        copy.recompile()
        call: Callable[..., Any] = copy.forward
        return call

    # a function of its own: graphs of the model that are compiled already are not touched, and calibrating often is no recompilation
    # and of the head only as much as the model can do with: nothing of it is recorded
    extra = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    compiled = torch.compile(compat.fresh(lambda *a, **k: model(*a, **extra | k)), backend=recording, fullgraph=True, dynamic=False)
    evaluating = model.training
    model.eval()
    try:
        for batch in inputs:
            blocks.run(model, batch, compiled)
    except Exception as error:
        if not compat.is_capture_error(error):
            raise
        cause = f"the model cannot be captured in one graph: {str(error).splitlines()[0]}"
        raise CalibrationError("E-CAL-GRAPH", cause, "remove the graph break, or calibrate the part without it") from error
    finally:
        model.train(evaluating)


def histogram_of(found: dict[str, Histogram], key: str, scale: Tensor | None = None) -> Seen:
    """Adds to the histogram `key`, magnitudes times `scale` (C,)."""
    own = found.setdefault(key, Histogram())
    return own.add if scale is None else lambda x: own.add(x.float() * scale.to(x.device))
