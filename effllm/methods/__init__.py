"""Methods that a recipe can name, and their parameters. One file per family; `base.Method` is the contract."""

from __future__ import annotations

from effllm.methods.activation import Activation
from effllm.methods.base import Method
from effllm.methods.bipolar import Bipolar
from effllm.methods.lowrank import LowRank
from effllm.methods.monarch import Monarch
from effllm.methods.nm import NM

METHODS: dict[str, type[Method]] = {name: kind for kind in (Bipolar, LowRank, Monarch, NM) for name in kind.names}

__all__ = ["METHODS", "NM", "Activation", "Bipolar", "LowRank", "Method", "Monarch"]
