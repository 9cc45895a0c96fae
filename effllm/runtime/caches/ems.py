"""A cache of a fixed number of tokens per head: the least attended ones are evicted, some merged (after EMS, arXiv 2412.08521; approximate).

State, B rows, G key heads, C = budget + slack slots: keys, values (B, G, C, D) in the model's dtype, positions (B, G, C) int64, and fp32
(B, G, C) each: `total` and `seen` (attention received and from how many queries), `local` (attention of recent queries), `weight` (log of the
attention mass that a merged token stands for). All heads hold the same number of tokens, each its own. Once C slots are full the cache is
compressed to `budget` tokens. Scores come from queries, so whoever runs attention has to call `observe` after it; effllm.hf.kv_evict does.

What a later question needs may be gone: accuracy on the second turn over one context is not that of a dense cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from effllm.errors import CacheError
from effllm.solvers.kv import evict

_SLOTS = ("keys", "values", "positions", "total", "seen", "local", "weight")


@dataclass(frozen=True)
class Ems:
    """`budget` tokens a head after compression, `slack` more until the next one; the rest as in effllm.solvers.kv.evict. `merge` is the number of
    tokens to be merged (-1: half the budget, 0: pure eviction)."""

    budget: int = 256
    slack: int = 64
    window: int = 32
    sinks: int = 4
    centres: float = 0.6
    threshold: float = 0.7
    merge: int = -1
    merge_keys: bool = False
    weighted: bool = False
    combine: str = "max"
    pool: int = 5

    @property
    def spec(self) -> str:
        """The settings as text."""
        return f"ems({','.join(f'{f.name}={getattr(self, f.name)}' for f in fields(self))})"

    def check(self) -> None:
        """Raise CacheError (E-KVC-VALUE) where the settings do not fit one another."""
        if self.slack < 1 or self.budget < self.window + self.sinks + 1 or self.window < 1 or self.sinks < 0:
            cause = f"budget={self.budget}, slack={self.slack}, window={self.window}, sinks={self.sinks}"
            raise CacheError("E-KVC-VALUE", f"ems: {cause}", "the budget exceeds window and sinks, the slack is at least 1")
        if not 0 < self.centres <= 1 or self.combine not in evict.COMBINE or self.pool % 2 == 0:
            raise CacheError("E-KVC-VALUE", f"ems: {asdict(self)}", f"centres is a share, combine one of {evict.COMBINE}, pool odd")


class EvictingLayer:
    """The cache of one attention layer."""

    def __init__(self, settings: Ems) -> None:
        settings.check()
        self.format = settings
        self.ready = False
        self.count = self.length = self.fixed = 0  # slots in use, tokens seen, slots that compression has filled
        self.pending: tuple[Tensor, Tensor] | None = None  # a prompt that does not fit, until its queries are observed
        self.held: dict[str, Tensor] = {}

    def allocate(self, k: Tensor, v: Tensor) -> None:
        """Make the tensors for keys and values like k and v (B, G, any, D)."""
        b, g, _, d = k.shape
        slots = self.format.budget + self.format.slack
        self.held = {"keys": k.new_zeros(b, g, slots, d), "values": v.new_zeros(b, g, slots, v.shape[-1])}
        self.held |= {n: torch.zeros(b, g, slots, device=k.device, dtype=torch.int64 if n == "positions" else torch.float32) for n in _SLOTS[2:]}
        self.ready = True

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: constant, whatever the number of tokens."""
        return sum(t.nbytes for t in self.held.values())

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, G, n, D); returns what attention is to see, (B, G, count + n, D). Raises CacheError (E-KVC-OBSERVE, E-KVC-SHAPE)."""
        if not self.ready:
            self.allocate(k, v)
        if self.pending is not None:
            cause = "attention over this cache was not observed, so it cannot tell which tokens matter"
            raise CacheError("E-KVC-OBSERVE", cause, "run the model inside `with effllm.hf.kv_evict.observing(model):`")
        held = self.held["keys"]
        if (k.shape[0], k.shape[1], k.shape[3], k.dtype) != (held.shape[0], held.shape[1], held.shape[3], held.dtype):
            cause = f"the cache is for {tuple(held.shape)}, {held.dtype}; the keys are {tuple(k.shape)}, {k.dtype}"
            raise CacheError("E-KVC-SHAPE", cause, "use one cache for one model and batch")
        n, at = k.shape[2], self.count
        both = (torch.cat((self.held["keys"][:, :, :at], k), 2), torch.cat((self.held["values"][:, :, :at], v), 2))
        if at + n > held.shape[2]:
            self.pending = both
        else:
            self.held["keys"][:, :, at : at + n], self.held["values"][:, :, at : at + n] = k, v
            self._begin(self.held, at, n)
        self.count, self.length = at + n, self.length + n
        return both

    def _begin(self, held: dict[str, Tensor], at: int, n: int) -> None:
        held["positions"][:, :, at : at + n] = torch.arange(self.length, self.length + n, device=held["positions"].device)
        for name in _SLOTS[3:]:
            held[name][:, :, at : at + n] = 0

    def observe(self, q: Tensor, scale: float) -> None:
        """Take note of what q (B, H, n, D), the newest n tokens, attended to; compress where the slots are full."""
        f, n = self.format, q.shape[2]
        if self.pending is None:
            keys, old = self.held["keys"][:, :, : self.count], {name: self.held[name][:, :, : self.count] for name in _SLOTS[2:]}
        else:
            keys = self.pending[0]
            old = {name: torch.nn.functional.pad(self.held[name][:, :, : self.count - n], (0, n)) for name in _SLOTS[2:]}
            old["positions"][:, :, self.count - n :] = torch.arange(self.length - n, self.length, device=keys.device)
        now = evict.observe(q, keys, scale, window=f.window)
        fresh = min(1.0, n / f.window)  # share of the last `window` queries that these are
        total, seen, local = old["total"] + now.total, old["seen"] + now.queries, old["local"] * (1 - fresh) + now.local * fresh
        if self.pending is None:
            for name, x in (("total", total), ("seen", seen), ("local", local)):
                self.held[name][:, :, : self.count] = x
            return
        score = evict.combine(total / seen.clamp_min(1), local, how=f.combine, pool=f.pool)
        kept = evict.compress(
            *self.pending, score, budget=f.budget, window=f.window, sinks=f.sinks, centres=f.centres, threshold=f.threshold,
            merge=None if f.merge < 0 else f.merge, merge_keys=f.merge_keys, weighted=f.weighted, weight=old["weight"],
        )  # fmt: skip
        index, self.count = kept.positions, kept.positions.shape[2]
        stored = {"keys": kept.keys, "values": kept.values, "weight": kept.weight, "positions": old["positions"].gather(2, index)}
        stored |= {name: x.gather(2, index) for name, x in (("total", total), ("seen", seen), ("local", local))}
        for name, x in stored.items():
            self.held[name][:, :, : self.count] = x.to(self.held[name].dtype)
        self.pending, self.fixed = None, self.count

    def bias(self) -> Tensor | None:
        """What is added to the scores of the slots in use, (B, G, count); None where nothing is."""
        if not self.format.weighted:
            return None
        held = self.held["weight"][:, :, : self.count]
        return torch.nn.functional.pad(held, (0, self.count - held.shape[2]))

    def reset(self) -> None:
        """Forget all tokens."""
        self.count = self.length = self.fixed = 0
        self.pending = None

    def crop(self, count: int) -> None:
        """Forget the newest `count` tokens. Raises CacheError (E-KVC-CROP) beyond the last compression."""
        if count >= self.length:
            self.reset()
        elif self.count - count < self.fixed:
            cause = f"{count} tokens, of which only {self.count - self.fixed} came after the last compression"
            raise CacheError("E-KVC-CROP", cause, "crop less, or use a larger slack")
        else:
            self.count, self.length = self.count - count, self.length - count

    def select(self, index: Tensor) -> None:
        """Keep the rows `index`."""
        self.held = {name: t[index] for name, t in self.held.items()}

    reorder = select

    def repeat(self, times: int) -> None:
        """Every row `times` times."""
        self.held = {name: t.repeat_interleave(times, 0) for name, t in self.held.items()}

    def about(self) -> dict[str, Any]:
        """What the tensors mean."""
        return {"format": self.format.spec, "version": 1, "count": self.count, "length": self.length, "fixed": self.fixed}

    def tensors(self) -> dict[str, Tensor]:
        """Everything that has to be stored. Raises CacheError (E-KVC-OBSERVE) in the middle of a prompt."""
        if self.pending is not None:
            raise CacheError("E-KVC-OBSERVE", "a prompt is not compressed yet", "finish the forward inside `observing(model)`")
        return dict(self.held)

    def load(self, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take over another layer's state. Raises CacheError (E-KVC-METHOD) where the format differs."""
        if (about.get("format"), about.get("version")) != (self.format.spec, 1):
            cause = f"the file holds {about.get('format')!r}, this cache is {self.format.spec!r}"
            raise CacheError("E-KVC-METHOD", cause, "load it into a cache of the same format")
        self.held = {name: tensors[name].clone() for name in _SLOTS}
        self.count, self.length, self.fixed = about["count"], about["length"], about["fixed"]
        self.pending, self.ready = None, True
