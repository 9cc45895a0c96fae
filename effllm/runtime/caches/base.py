"""The contract of a cache format: how a page of tokens becomes bytes, and back.

A cache keeps its newest tokens dense and packs older ones, `page` tokens at a time, in the order they came. Pages begin at multiples
of `page` counted from token 0 and never change once written, so however the tokens arrive (one prompt, chunks, one by one) the bytes
are the same. A format says what is in a page; appending, reading, cropping, growing, reordering and saving are common (layer.py).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from effllm.errors import CacheError, nearest
from effllm.runtime.caches.layout import Layout

FORMATS: dict[str, type[CacheFormat]] = {}
_ELSEWHERE = {  # what is named like a format and is none: cause, next step
    "ems": ("ems keeps a budget of tokens and no pages", "use effllm.hf.kv_evict: EvictingCache(model, Ems(budget=...)) inside observing(model)"),
}


@dataclass(frozen=True)
class CacheFormat(ABC):
    """What a method does to keys and values; frozen, so that `spec` names it wholly.

    `page`: tokens that are packed together. `window`: newest tokens that are always dense; between `window` + 1 and `window` + `page`
    tokens are, once there are that many. Subclasses add their own settings as fields with defaults (int, float, bool or str).
    """

    page: int = 64
    window: int = 64

    name: ClassVar[str]
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = False  # decode(encode(x)) == x in the cache's dtype

    def __init_subclass__(cls, **kw: Any) -> None:
        super().__init_subclass__(**kw)
        if "name" in cls.__dict__:
            FORMATS[cls.name] = cls

    @property
    def spec(self) -> str:
        """The format as text, such as "kivi(page=64,window=64,bits=4,group=64)"; `parse(spec)` gives it back."""
        return f"{self.name}({','.join(f'{f.name}={getattr(self, f.name)}' for f in fields(self))})"

    def check(self, heads: int, dim: int) -> None:
        """Raise CacheError (E-KVC-VALUE, E-KVC-SHAPE) where the settings or the head size do not fit. Subclasses extend it."""
        if self.page < 1 or self.window < 0:
            raise CacheError("E-KVC-VALUE", f"page={self.page}, window={self.window}", "page is at least 1 and window at least 0")

    @abstractmethod
    def layout(self, heads: int, dim: int, dtype: torch.dtype) -> Layout:
        """The tensors of a page for `heads` key heads of `dim` channels; `dtype` is the model's."""

    @abstractmethod
    def encode(self, k: Tensor, v: Tensor, tables: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """Pages k, v (..., heads, page, dim) in the model's dtype to the layout's fields (..., heads, *shape)."""

    @abstractmethod
    def decode(self, held: Mapping[str, Tensor], tables: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The exact fp32 values (..., heads, page, dim) of what is stored."""

    def tables(self, heads: int, dim: int, device: torch.device) -> list[Tensor]:
        """Constant tensors that a layer holds beside its pages (bases, permutations); none by default. `Layer(tables=...)` overrides."""
        del heads, dim, device
        return []

    def table_shapes(self, heads: int, dim: int) -> Sequence[tuple[int, ...]]:
        """What given tables must look like."""
        del heads, dim
        return ()

    def bytes_per_token(self, heads: int, dim: int, dtype: torch.dtype) -> float:
        """Stored bytes of a packed token, keys and values of all heads together, without alignment."""
        return self.layout(heads, dim, dtype).payload / self.page


@lru_cache(maxsize=256)
def parse(spec: str) -> CacheFormat:
    """The format that a text such as "gear(bits=4)" means. Raises CacheError (E-KVC-NAME, E-KVC-KEY, E-KVC-VALUE)."""
    found = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", spec, re.S)
    if found is None:
        raise CacheError("E-KVC-NAME", f"cannot read the cache {spec!r}", "the form is name(key=value, ...)")
    items = [p.strip() for p in (found[2] or "").split(",") if p.strip()]
    pairs = [(key.strip(), value.strip()) for key, _, value in (item.partition("=") for item in items)]
    return make(found[1], dict(pairs))


def make(name: str, values: Mapping[str, Any]) -> CacheFormat:
    """A format by name and settings (texts are converted to the settings' types). Raises CacheError as `parse` does."""
    known = formats()
    if name in _ELSEWHERE:
        raise CacheError("E-KVC-NAME", *_ELSEWHERE[name])
    if name not in known:
        raise CacheError("E-KVC-NAME", f"unknown cache {name!r}", nearest(name, known))
    own = {f.name: f for f in fields(known[name])}
    given = {}
    for key, value in values.items():
        if key not in own:
            raise CacheError("E-KVC-KEY", f"{name} has no setting {key!r}", nearest(key, own))
        given[key] = _value(name, key, value, type(own[key].default))
    made = known[name](**given)
    made.check(1, 0)
    return made


def formats() -> dict[str, type[CacheFormat]]:
    """Every format by name."""
    from effllm.runtime.caches import registered

    del registered  # importing it registers them
    return FORMATS


def _value(name: str, key: str, value: Any, kind: type) -> Any:
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]
        if kind is int and float(value) != int(float(value)):
            raise ValueError
        return kind(int(float(value)) if kind is int else value)
    except (ValueError, KeyError, TypeError) as error:
        raise CacheError("E-KVC-VALUE", f"{name}: {key}={value!r}", f"{key} is of type {kind.__name__}") from error
