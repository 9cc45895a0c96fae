"""Attention by segments inside transformers' models: the table of runtime/segments.py travels in the place of the 4-d mask.

Models hand a 4-d mask to every layer untouched, so an int32 table (1, 1, S, 4) reaches the attention function of each. Registered under
one name per implementation that a model had before; with any other mask that implementation runs, so that a model in use by somebody
else at the same time behaves as ever.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from effllm import compat
from effllm.errors import PromptError
from effllm.lowering import providers
from effllm.lowering.op import Problem
from effllm.lowering.packed_attention import SEGMENTS
from effllm.runtime.segments import COLUMNS

PREFIX = "effllm+"
_OP = getattr(torch.ops.effllm, SEGMENTS.name)
_REFUSED = {"s_aux": "attention sinks", "position_bias": "a position bias", "head_mask": "a head mask"}
_kernels: dict[tuple[str, torch.dtype, int], str] = {}
_lock = threading.Lock()
_users: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # model -> calls that are inside `attending`
_seen = threading.local()


def kernel(device: str, dtype: torch.dtype, size: int) -> str:
    """The kernel for a device type and a head size; chosen in the first forward, which is eager, and then known to graphs."""
    key = (device, dtype, size)
    if key not in _kernels:
        _kernels[key] = providers.select(Problem("packed_attention", 0, size, 0, 0, False, dtype=dtype, device=device))[0].name
    return _kernels[key]


def calls() -> int:
    """How often this thread's eager forwards came through here."""
    return int(getattr(_seen, "calls", 0))


def _is_table(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[-1] == COLUMNS


def _attend(base: str, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **more: Any) -> tuple[Tensor, Any]:
    if not _is_table(attention_mask):
        plain: Any = ALL_ATTENTION_FUNCTIONS.get(base) or sys.modules[type(module).__module__].eager_attention_forward
        out: tuple[Tensor, Any] = plain(module, query, key, value, attention_mask, **more)
        return out
    for name, what in _REFUSED.items():
        if more.get(name) is not None:
            raise PromptError("E-PRM-ATTENTION", f"{type(module).__name__} has {what}, which attention by segments lacks", "use the model's own generate")
    if getattr(module, "is_causal", True) is False:
        raise PromptError("E-PRM-ATTENTION", f"{type(module).__name__} is not causal", "load the model as a decoder")
    if not torch.compiler.is_compiling():
        _seen.calls = calls() + 1
    scale = more.get("scaling")
    y = _OP(
        query, key, value, attention_mask[0, 0], query.shape[-1] ** -0.5 if scale is None else float(scale),
        int(more.get("sliding_window") or 0), float(more.get("softcap") or 0.0), kernel(query.device.type, query.dtype, query.shape[-1]),
    )  # fmt: skip
    return y, None


def _register(base: str) -> str:
    name = PREFIX + base
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _bound(base))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def _bound(base: str) -> Callable[..., tuple[Tensor, Any]]:
    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **more: Any) -> tuple[Tensor, Any]:
        return _attend(base, module, query, key, value, attention_mask, **more)

    return attend


def _configs(model: Any) -> list[Any]:
    found = {id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), "_attn_implementation")}
    return list(found.values())


class Attending:
    """`with Attending(model).on():` the model's attention understands tables. Cheap to enter; threads may overlap."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._configs = _configs(model)
        for config in self._configs:
            base = compat.attention_implementation(config).removeprefix(PREFIX)
            if base not in ("eager", *ALL_ATTENTION_FUNCTIONS):
                raise PromptError("E-PRM-ATTENTION", f"the attention implementation {base!r} is unknown", "load the model with attn_implementation='sdpa'")
            _register(base)

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Switch, and switch back when the last of those inside leaves."""
        with _lock:
            _users[self._model] = _users.get(self._model, 0) + 1
            for config in self._configs:
                base = compat.attention_implementation(config).removeprefix(PREFIX)
                compat.set_attention_implementation(config, PREFIX + base)
        try:
            yield
        finally:
            with _lock:
                _users[self._model] -= 1
                if not _users[self._model]:
                    for config in self._configs:
                        compat.set_attention_implementation(config, compat.attention_implementation(config).removeprefix(PREFIX))
