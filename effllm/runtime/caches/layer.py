"""The cache of one attention layer: tensors that are allocated once and written in place, and what one does with them.

`update` appends and returns the keys and values that attention is to see, so plain attention over them is what a method means. A
compiled graph finds the append and the read and puts one op in the place of read and attention (passes/compressed_attention.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effllm.errors import CacheError
from effllm.lowering import providers
from effllm.runtime.caches import paging
from effllm.runtime.caches.base import CacheFormat, parse

_PARTS = ("pages", "ring", "lens", "start")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _sizes(spec: str) -> tuple[int, int]:
    """page and window."""
    fmt = parse(spec)
    return fmt.page, fmt.window


class Layer:
    """Keys and values of one layer in a format.

    `capacity` tokens at least are allocated at the first use (`limit` says how many really fit); None lets the cache grow, which
    happens between calls and never inside a compiled graph. `tables` replace the format's own (see CacheFormat.tables).
    """

    pages: Tensor
    ring: Tensor
    lens: Tensor
    start: Tensor

    def __init__(self, fmt: CacheFormat | str, capacity: int | None = None, tables: Sequence[Tensor] | None = None) -> None:
        self.format = parse(fmt) if isinstance(fmt, str) else fmt
        self.spec = self.format.spec  # compiled code reads this alone: numbers of objects become dynamic once two caches differ in them
        self.capacity = capacity
        self.tables = None if tables is None else list(tables)
        self.ready = False
        if capacity is not None and (not isinstance(capacity, int) or capacity < 1):
            raise CacheError("E-KVC-VALUE", f"a capacity of {capacity!r} tokens", "give a positive number, or None to let the cache grow")
        providers.load("cpu")  # defines the ops

    # ---- allocation

    def allocate(self, k: Tensor, v: Tensor) -> None:
        """Make the tensors for keys and values like k and v (B, G, any, D). Raises CacheError (E-KVC-SHAPE) where the format does not fit."""
        batch, heads, _, dim = k.shape
        if v.shape[-1] != dim or v.shape[1] != heads:
            raise CacheError("E-KVC-SHAPE", f"keys of {tuple(k.shape)} and values of {tuple(v.shape)}", "leave such layers dense")
        self.format.check(heads, dim)
        self._like(batch, heads, dim, k.dtype, k.device, paging.pages_for(self.format, self.capacity or 0))
        if self.tables is None:
            self.tables = self.format.tables(heads, dim, k.device)
        self._need_tables(self.tables, heads, dim)
        self.tables = [t.to(k.device) for t in self.tables]
        self.ready = True

    def _need_tables(self, tables: Sequence[Tensor], heads: int, dim: int) -> None:
        given, taken = [tuple(t.shape) for t in tables], [tuple(s) for s in self.format.table_shapes(heads, dim)]
        if given != taken:
            what = f"{self.format.name} takes tables of shapes {taken} in a layer of {heads} heads of {dim} channels; these are {given}"
            raise CacheError("E-KVC-BASIS", what, "make them for this model, as effllm.hf.kv_calibrate does")

    def _like(self, batch: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device, pages: int) -> None:
        size = self.format.layout(heads, dim, dtype).page
        self.pages = torch.zeros(batch, pages, size, dtype=torch.uint8, device=device)
        self.ring = torch.zeros(batch, 2, heads, self.format.window + self.format.page, dim, dtype=dtype, device=device)
        self.lens = torch.zeros(2, dtype=torch.int64, device=device)
        self.start = torch.zeros(batch, dtype=torch.int64, device=device)
        self._static()

    def _static(self) -> None:
        if not torch.compiler.is_compiling():
            for name in _PARTS:
                torch._dynamo.mark_static_address(getattr(self, name))

    @property
    def limit(self) -> int:
        """Tokens that fit without growing."""
        page, window = _sizes(self.spec)
        return self.pages.shape[1] * page + window + page

    @property
    def full(self) -> int:
        """`limit` of a static cache, known before it is allocated."""
        return paging.capacity(self.format, paging.pages_for(self.format, self.capacity or 0))

    @property
    def nbytes(self) -> int:
        """Bytes of pages, ring, lengths and tables."""
        tensors = [getattr(self, n) for n in _PARTS] + (self.tables or []) if self.ready else []
        return sum(t.numel() * t.element_size() for t in tensors)

    def reserve(self, more: int) -> None:
        """Make room for `more` tokens: a growing cache grows, a static one raises CacheError (E-KVC-FULL). Not for compiled graphs."""
        total = int(self.lens[0])
        if self.capacity is not None or total + more <= self.limit:
            paging.check_room(total, more, self.limit)
            return
        count = self.pages.shape[1]
        need = max(paging.pages_for(self.format, total + more), 2 * count, 4)
        more_pages = self.pages.new_zeros(self.pages.shape[0], need - count, self.pages.shape[2])
        self.pages = torch.cat([self.pages, more_pages], 1)
        self._static()

    # ---- tokens

    def update(self, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append k and v (B, G, n, D) and return what attention is to see: the new tokens exact, the old ones as stored.

        Static: (B, G, limit, D), to be used with a mask, since only the first `length` tokens mean something. Growing: (B, G, length, D).
        Further arguments are what model code passes along; they mean nothing here.
        """
        if not self.ready:
            self.allocate(k, v)
        self._same(k)
        more = k.shape[2]
        if not torch.compiler.is_compiling():
            self.reserve(more)
        if more <= _sizes(self.spec)[1] + 1:  # so many are always dense
            self.append(k, v)
            keys, values = self.read()
        else:
            at = torch.arange(more, device=k.device) + self.lens[0]
            keys, values = (t.index_copy(2, at, new) for t, new in zip(self.read(), (k, v), strict=True))
            self.append(k, v)
        if self.capacity is None and not torch.compiler.is_compiling():
            length = int(self.lens[0])
            return keys[:, :, :length], values[:, :, :length]
        return keys, values

    def _same(self, k: Tensor) -> None:
        batch, _, heads, _, dim = self.ring.shape
        if (k.shape[0], k.shape[1], k.shape[3], k.dtype) != (batch, heads, dim, self.ring.dtype):
            held = f"the cache is for batch {batch}, {heads} heads of {dim} channels, {self.ring.dtype}"
            raise CacheError("E-KVC-SHAPE", f"{held}; the keys are {tuple(k.shape)}, {k.dtype}", "use one cache for one model and batch")

    def append(self, k: Tensor, v: Tensor) -> None:
        """Write k and v (B, G, n, D) behind what is there."""
        torch.ops.effllm.kv_append(self.pages, self.ring, self.lens, self.start, k, v, self._tables, self.spec, "auto")

    def read(self) -> tuple[Tensor, Tensor]:
        """Dense keys and values (B, G, limit, D)."""
        out: tuple[Tensor, Tensor] = torch.ops.effllm.kv_read(self.pages, self.ring, self.lens, self._tables, self.spec)
        return out

    def attend(self, q: Tensor, mask: Tensor | None = None, scale: float | None = None, kernel: str = "auto") -> Tensor:
        """Attention of q (B, H, Q, D) over all tokens, dense keys and values never made; mask (1|B, 1|H, 1|Q, limit) bool or additive."""
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out: Tensor = torch.ops.effllm.kv_attend(q, self.pages, self.ring, self.lens, self._tables, mask, scale, self.spec, kernel)
        return out

    @property
    def _tables(self) -> list[Tensor]:
        return self.tables or []

    # ---- lifecycle

    def reset(self) -> None:
        """Forget all tokens; the tensors stay."""
        if self.ready:
            for name in _PARTS:
                getattr(self, name).zero_()

    def crop(self, count: int) -> None:
        """Forget the newest `count` tokens. Raises CacheError (E-KVC-CROP) where some of them are in a page already."""
        total, flushed = (int(i) for i in self.lens.tolist()) if self.ready else (0, 0)
        keep = max(0, total - count)
        if keep == 0:
            self.reset()
        elif keep < flushed:
            step = f"crop at most {total - flushed} tokens here, or use a larger window"
            raise CacheError("E-KVC-CROP", f"{count} tokens off {total}, of which the first {flushed} are packed and cannot be cut", step)
        else:
            self.lens[0] = keep

    def reorder(self, index: Tensor) -> None:
        """Row i becomes what row index[i] was, in place."""
        for t in (self.pages, self.ring, self.start) if self.ready else ():
            t.copy_(t.index_select(0, index.to(t.device)))

    def select(self, index: Tensor) -> None:
        """Keep the rows `index` (int64 or bool (B,)); the batch may change."""
        for name in ("pages", "ring", "start") if self.ready else ():
            t = getattr(self, name)
            setattr(self, name, t[index.to(t.device)])
        if self.ready:
            self._static()

    def repeat(self, times: int) -> None:
        """Every row `times` times, one behind the other."""
        if self.ready:
            self.select(torch.arange(self.start.shape[0]).repeat_interleave(times))

    def set_start(self, start: Tensor) -> None:
        """The first token (B,) of each row that is no padding; what lies before stays out of the packed pages' ranges."""
        self.start.copy_(start)

    # ---- storing

    def about(self) -> dict[str, Any]:
        """What the tensors mean: format, version, sizes and capacity."""
        _, _, heads, _, dim = self.ring.shape
        return {"format": self.format.spec, "version": self.format.version, "heads": heads, "dim": dim, "capacity": self.capacity}

    def tensors(self) -> dict[str, Tensor]:
        """Everything that has to be stored."""
        tables = {f"tables.{i}": t for i, t in enumerate(self._tables)}
        return {name: getattr(self, name) for name in _PARTS} | tables

    def load(self, about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take over what `about` and `tensors` of another layer gave; a layer with a capacity keeps it, one without takes the other's.

        Raises CacheError (E-KVC-METHOD) where the format differs, E-KVC-FULL where the tokens do not fit the capacity.
        """
        own = {"format": self.format.spec, "version": self.format.version}
        if about.get("version") != self.format.version or not self._means(about.get("format")):
            step = "load it into a cache of the same format and settings"
            raise CacheError("E-KVC-METHOD", f"the file holds {about.get('format')!r}, version {about.get('version')!r}, this cache is {own}", step)
        pages = self._sized(tensors["pages"], int(tensors["lens"][0]))
        for name in _PARTS:
            setattr(self, name, (pages if name == "pages" else tensors[name]).clone())
        self.tables = [tensors[f"tables.{i}"].clone() for i in range(sum(n.startswith("tables.") for n in tensors))]
        self.capacity = about["capacity"] if self.capacity is None else self.capacity
        self.ready = True
        self._static()

    def _sized(self, pages: Tensor, total: int) -> Tensor:
        """Stored pages (B, P, bytes) of `total` tokens, cut or filled up to this layer's capacity."""
        if self.capacity is None:
            return pages
        count = paging.pages_for(self.format, self.capacity)
        if total > paging.capacity(self.format, count):
            what = f"{total} tokens are stored, and the cache holds {paging.capacity(self.format, count)}"
            raise CacheError("E-KVC-FULL", what, "load them into a larger cache, or one that grows; this one is unchanged")
        return torch.nn.functional.pad(pages, (0, 0, 0, count - pages.shape[1]))

    def _means(self, text: object) -> bool:
        """Whether a text is this format; settings that it does not name have their defaults."""
        try:
            return parse(str(text)) == self.format
        except CacheError:
            return False
