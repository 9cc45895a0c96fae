"""Candidates made of another library's linear module: deep copies of it, called one after another."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effllm.autotune.bench.candidate import Rotating, copies


class Modules(Rotating):
    """`layer` in as many copies as exceed the cache. `dequantize` gives the stored weight (N, K) of a layer; `dtype` is of its activations."""

    def __init__(
        self, layer: torch.nn.Module, nbytes: int, cache: int, dequantize: Callable[[Any], Tensor] | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        super().__init__([layer] + [copy.deepcopy(layer) for _ in range(copies(nbytes, cache) - 1)], nbytes)
        self._dequantize, self._dtype = dequantize, dtype

    def load(self, x: Tensor) -> None:
        """Take the activations in the module's dtype."""
        self.x = x.to(self._dtype)

    def call(self, weight: Any, x: Tensor) -> Tensor:
        """The module's forward."""
        with torch.no_grad():
            y: Tensor = weight(x)
        return y

    def stored(self, index: Tensor) -> Tensor | None:
        """What the library itself says is stored."""
        if self._dequantize is None:
            return None
        with torch.no_grad():
            return self._dequantize(self.weights[0])[index].double()


def linear(weight: Tensor) -> torch.nn.Linear:
    """A dense layer around a weight (N, K), without bias."""
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    return layer
