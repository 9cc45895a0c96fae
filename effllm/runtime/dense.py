"""The dense modules that can be packed, and how each holds its matrix.

nn.Linear and nn.Embedding hold (out, in). Conv1D of transformers (GPT-2) is a linear that holds (in, out): it packs like the
Linear with the transposed weight, and that is what takes its place.
"""

from __future__ import annotations

from torch import Tensor, nn

from effllm import compat


def kind_of(module: nn.Module) -> str:
    """"linear" or "embedding", as recipes name it; empty for modules that are not packed."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "linear" if isinstance(module, nn.Linear) or is_transposed(module) else ""


def is_transposed(module: nn.Module) -> bool:
    """Whether the module's weight is (in, out)."""
    cls = compat.conv1d()
    return cls is not None and isinstance(module, cls)


def matrix(module: nn.Module) -> Tensor:
    """The module's weight as (out, in), a view of it."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.t() if is_transposed(module) else weight
