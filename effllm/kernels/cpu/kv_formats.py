"""The CPU providers of attention over Mustafar, block-floating-point and Matryoshka caches: which arguments the C++ ops take.

A C++ op gets the page's sizes as numbers and the byte offsets of the fields in a record, so that the layout is written down once, in the format.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from effllm.kernels.cpu.build import Isa, missing
from effllm.lowering.op import OPS, Problem, Provider, Verdict
from effllm.runtime.caches.base import parse
from effllm.runtime.caches.bfp import Bfp
from effllm.runtime.caches.matryoshka import Matryoshka
from effllm.runtime.caches.mustafar import Mustafar
from effllm.runtime.formats.kv import bitmap

Turn = tuple[Tensor | None, Tensor | None, Tensor | None, bool]  # row, cos, sin, half
PLAIN: Turn = (None, None, None, False)  # keys are read at the positions that they were stored for
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_QUERIES = 8  # beyond, dense products on decoded keys and values win


def kv_attend_bitmap(q, pages, ring, lens, mask, scale, page, keep, bits, kval, kmap, vval, vmap, kscale, vscale, row, cos, sin, half):  # type: ignore[no-untyped-def]
    """The op's fake."""
    return q.new_empty(q.shape)


def kv_attend_bfp(q, pages, ring, lens, korder, vorder, mask, scale, page, block, bits, vbits, kcodes, kexp, vcodes, vexp, row, cos, sin, half):  # type: ignore[no-untyped-def]
    """The op's fake."""
    return q.new_empty(q.shape)


def kv_attend_matryoshka(q, pages, ring, lens, uk, mk, uv, mv, mask, scale, page, kranks, vranks, kat, vat, row, cos, sin, half):  # type: ignore[no-untyped-def]
    """The op's fake."""
    return q.new_empty(q.shape)


FAKES: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (kv_attend_bitmap, kv_attend_bfp, kv_attend_matryoshka)}


@lru_cache(maxsize=256)
def mustafar(spec: str, heads: int, dim: int, dtype: torch.dtype) -> tuple[int, ...]:
    """page, kept channels, bits, and the byte offsets kval, kmap, vval, vmap, kscale, vscale."""
    fmt = parse(spec)
    assert isinstance(fmt, Mustafar)
    at = fmt.layout(heads, dim, dtype).offsets()
    places = (at["kval"], at["kmap"], at["vval"], at["vmap"], at.get("kscale", 0), at.get("vscale", 0))
    return (fmt.page, bitmap.keep_count(dim, fmt.sparsity), fmt.bits, *places)


@lru_cache(maxsize=256)
def bfp(spec: str, heads: int, dim: int, dtype: torch.dtype) -> tuple[int, ...]:
    """page, block, bits of keys and of values, and the byte offsets kcodes, kexp, vcodes, vexp."""
    fmt = parse(spec)
    assert isinstance(fmt, Bfp)
    at = fmt.layout(heads, dim, dtype).offsets()
    return (fmt.page, fmt.block, fmt.bits, fmt.vbits, at["kcodes"], at["kexp"], at["vcodes"], at["vexp"])


@lru_cache(maxsize=256)
def matryoshka(spec: str, heads: int, dim: int, dtype: torch.dtype) -> tuple[int, list[int], list[int], int, int]:
    """page, ranks of keys and of values, and the byte offsets k, v."""
    fmt = parse(spec)
    assert isinstance(fmt, Matryoshka)
    at = fmt.layout(heads, dim, dtype).offsets()
    return (fmt.page, *fmt.ranks(heads, dim), at["k"], at["v"])


def _call_mustafar(
    ops: Any, q: Tensor, pages: Tensor, ring: Tensor, lens: Tensor, tables: list[Tensor], mask: Tensor | None, scale: float, spec: str, turn: Turn
) -> Tensor:  # fmt: skip
    y: Tensor = ops.kv_attend_bitmap(q, pages, ring, lens, mask, scale, *mustafar(spec, ring.shape[2], ring.shape[4], ring.dtype), *turn)
    return y


def _call_bfp(
    ops: Any, q: Tensor, pages: Tensor, ring: Tensor, lens: Tensor, tables: list[Tensor], mask: Tensor | None, scale: float, spec: str, turn: Turn
) -> Tensor:  # fmt: skip
    y: Tensor = ops.kv_attend_bfp(q, pages, ring, lens, tables[0], tables[1], mask, scale, *bfp(spec, ring.shape[2], ring.shape[4], ring.dtype), *turn)
    return y


def _call_matryoshka(
    ops: Any, q: Tensor, pages: Tensor, ring: Tensor, lens: Tensor, tables: list[Tensor], mask: Tensor | None, scale: float, spec: str, turn: Turn
) -> Tensor:  # fmt: skip
    page, k, v, kat, vat = matryoshka(spec, ring.shape[2], ring.shape[4], ring.dtype)
    y: Tensor = ops.kv_attend_matryoshka(q, pages, ring, lens, *tables, mask, scale, page, k, v, kat, vat, *turn)
    return y


CALLS: dict[str, Callable[..., Tensor]] = {"mustafar": _call_mustafar, "bfp": _call_bfp, "matryoshka": _call_matryoshka}


def _refusal(problem: Problem, name: str, isa: Isa) -> str:
    detail = dict(problem.detail)
    lacking = missing(isa)
    if detail.get("format") != name:
        return f"is for {name}, the cache is {detail.get('format')}"
    if lacking:
        return f"processor lacks {', '.join(lacking)}"
    if problem.dtype not in _FLOATS:
        return f"queries are {problem.dtype}, not float32, bfloat16 or float16"
    if problem.m is None or problem.m > MAX_QUERIES:
        return f"{'a dynamic number of' if problem.m is None else problem.m} queries: the kernel is for up to {MAX_QUERIES}"
    return ""


def register(isa: Isa, rank: int, ensure: Callable[[Isa], None]) -> None:
    """Add an instruction set's providers, one per format; `ensure` builds and loads them on first use."""
    for name, call in CALLS.items():

        def run(*args: Any, call: Callable[..., Tensor] = call) -> Tensor:
            ensure(isa)
            return call(getattr(torch.ops, isa.namespace), *args, PLAIN)

        def turned(*args: Any, call: Callable[..., Tensor] = call) -> Tensor:
            ensure(isa)
            *first, row, cos, sin, layout, scale, spec = args
            return call(getattr(torch.ops, isa.namespace), *first, scale, spec, (row, cos, sin, layout == "half"))

        def supports(problem: Problem, name: str = name) -> Verdict:
            why = _refusal(problem, name, isa)
            return Verdict(not why, why)

        for op, go in (("kv_attend", run), ("kv_attend_turned", turned)):
            OPS[op].register(Provider(f"cpu-{isa.name}-{name}", op, "cpu", "pages", supports, go, None, lambda: ensure(isa), rank=rank))
