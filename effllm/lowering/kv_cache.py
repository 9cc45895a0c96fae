"""Ops of compressed key-value caches: append, read, and attention that never makes dense keys and values.

`kv_attend_turned` is attention over a cache whose text was edited: the key in slot s stands, and is turned, by table row row[s] away from
where it was packed. Kernels turn the query instead, once per table row, q . R(a) k = R(-a) q . k, and pages stay as they are.

The state is that of runtime/caches/paging.py (pages, ring, lens, start), `spec` the format as text, `tables` the format's constant
tensors. `kernel` names a provider, "auto" takes the best one. Append and attention go to a provider's own op; the reference runs the
plain-torch functions behind an opaque op, because what it does depends on the lengths, which are data.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from effllm.lowering import providers
from effllm.lowering.bipolar_linear import provider
from effllm.lowering.op import LIBRARY, YES, Op, Problem, Provider, define
from effllm.runtime.caches import paging
from effllm.runtime.caches.base import parse
from effllm.runtime.rotary import rotate


def append_reference(pages: Tensor, ring: Tensor, lens: Tensor, start: Tensor, k: Tensor, v: Tensor, tables: list[Tensor], spec: str) -> None:
    """Write k and v (B, G, n, D) behind what is there. Raises CacheError (E-KVC-FULL) before any write."""
    paging.append(parse(spec), pages, ring, lens, start, k, v, tables)


def read_reference(pages: Tensor, ring: Tensor, lens: Tensor, tables: list[Tensor], spec: str) -> tuple[Tensor, Tensor]:
    """Dense keys and values (B, G, capacity, D)."""
    return paging.read(parse(spec), pages, ring, lens, tables)


def attend_reference(q: Tensor, pages: Tensor, ring: Tensor, lens: Tensor, tables: list[Tensor], mask: Tensor | None, scale: float, spec: str) -> Tensor:
    """softmax(scale * q K^T + mask) V over the tokens that are there, q (B, H, Q, D), mask (1|B, 1|H, 1|Q, capacity) bool or additive."""
    k, v = paging.read(parse(spec), pages, ring, lens, tables)
    return _dense(q, k, v, lens, mask, scale)


def attend_turned_reference(
    q: Tensor, pages: Tensor, ring: Tensor, lens: Tensor, tables: list[Tensor], mask: Tensor | None, row: Tensor, cos: Tensor, sin: Tensor, layout: str,
    scale: float, spec: str,
) -> Tensor:  # fmt: skip
    """As `attend_reference` with key s turned by the angles of cos, sin (A, R / 2) at row[s] (capacity,), which are not rounded to the cache's dtype."""
    k, v = paging.read(parse(spec), pages, ring, lens, tables)
    return _dense(q.to(cos.dtype), rotate(k, cos[row], sin[row], layout), v, lens, mask, scale).to(q.dtype)


def _dense(q: Tensor, k: Tensor, v: Tensor, lens: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    there = (torch.arange(k.shape[2], device=k.device) < lens[0]).expand(1, 1, 1, -1)
    if mask is None:
        mask = there
    elif mask.dtype == torch.bool:
        mask = mask & there
    else:
        mask = mask.to(q.dtype).masked_fill(~there, float("-inf"))
    return torch.nn.functional.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def problem(op: str, spec: str, heads: int, ring: Tensor, n: int | None) -> Problem:
    """What a provider must know: the format's name and text, key heads (n), head size (k), query heads and their dtype."""
    return _problem(op, spec, heads, ring.shape[2], ring.shape[4], ring.dtype, ring.device.type, n)


def _problem(op: str, spec: str, heads: int, key_heads: int, dim: int, dtype: torch.dtype, device: str, n: int | None) -> Problem:
    fmt = parse(spec)
    detail = (("format", fmt.name), ("heads", heads), ("spec", fmt.spec))
    bits, group = int(getattr(fmt, "bits", 0)), int(getattr(fmt, "group", 0))
    return Problem(op, key_heads, dim, bits, group, False, m=n, dtype=dtype, device=device, detail=detail)


@lru_cache(maxsize=1024)
def _choose(kernel: str, *about: Any) -> str:
    return providers.select(_problem(*about), None if kernel == "auto" else kernel)[0].name


def choose(op: str, kernel: str, spec: str, heads: int, ring: Tensor, n: int | None) -> str:
    """The provider's name, the best one for "auto". Raises KernelError for a kernel that is not there or refuses."""
    return _choose(kernel, op, spec, heads, ring.shape[2], ring.shape[4], ring.dtype, ring.device.type, n)


def _append(pages, ring, lens, start, k, v, tables, spec, kernel):  # type: ignore[no-untyped-def]
    rows = k.shape[2] if isinstance(k.shape[2], int) else None
    provider("kv_append", choose("kv_append", kernel, spec, k.shape[1], ring, rows)).call(pages, ring, lens, start, k, v, tables, spec)


def _read(pages, ring, lens, tables, spec):  # type: ignore[no-untyped-def]
    return torch.ops.effllm.kv_read_reference(pages, ring, lens, tables, spec)


def _attend(q, pages, ring, lens, tables, mask, scale, spec, kernel):  # type: ignore[no-untyped-def]
    rows = q.shape[2] if isinstance(q.shape[2], int) else None
    name = choose("kv_attend", kernel, spec, q.shape[1], ring, rows)
    return provider("kv_attend", name).call(q, pages, ring, lens, tables, mask, scale, spec)


def _attend_turned(q, pages, ring, lens, tables, mask, row, cos, sin, layout, scale, spec, kernel):  # type: ignore[no-untyped-def]
    count = q.shape[2] if isinstance(q.shape[2], int) else None
    name = choose("kv_attend_turned", kernel, spec, q.shape[1], ring, count)
    return provider("kv_attend_turned", name).call(q, pages, ring, lens, tables, mask, row, cos, sin, layout, scale, spec)


_STATE = "Tensor(a!) pages, Tensor(b!) ring, Tensor(c!) lens, Tensor start, Tensor k, Tensor v, Tensor[] tables, str spec"
_READ = "Tensor pages, Tensor ring, Tensor lens, Tensor[] tables, str spec"
_ATTEND = "Tensor q, Tensor pages, Tensor ring, Tensor lens, Tensor[] tables, Tensor? mask, float scale, str spec"
_TURNED = (
    "Tensor q, Tensor pages, Tensor ring, Tensor lens, Tensor[] tables, Tensor? mask, Tensor row, Tensor cos, Tensor sin, str layout, float scale, str spec"
)
_FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

for _name, _schema, _call in (
    ("kv_append_reference", f"({_STATE}) -> ()", append_reference),
    ("kv_read_reference", f"({_READ}) -> (Tensor, Tensor)", read_reference),
    ("kv_attend_reference", f"({_ATTEND}) -> Tensor", attend_reference),
    ("kv_attend_turned_reference", f"({_TURNED}) -> Tensor", attend_turned_reference),
):
    LIBRARY.define(f"{_name}{_schema}", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(_name, _call, "CompositeExplicitAutograd")


@torch.library.register_fake("effllm::kv_append_reference")
def _append_fake(pages, ring, lens, start, k, v, tables, spec) -> None:  # type: ignore[no-untyped-def]
    return None


@torch.library.register_fake("effllm::kv_read_reference")
def _read_fake(pages, ring, lens, tables, spec):  # type: ignore[no-untyped-def]
    b, _, g, width, d = ring.shape
    shape = (b, g, pages.shape[1] * parse(spec).page + width, d)
    return ring.new_empty(shape), ring.new_empty(shape)


@torch.library.register_fake("effllm::kv_attend_reference")
def _attend_fake(q, pages, ring, lens, tables, mask, scale, spec):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape)


@torch.library.register_fake("effllm::kv_attend_turned_reference")
def _attend_turned_fake(q, pages, ring, lens, tables, mask, row, cos, sin, layout, scale, spec):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape)


def _opaque(name: str):  # type: ignore[no-untyped-def]
    return lambda *args: getattr(torch.ops.effllm, name)(*args)


APPEND: Op = define(f"kv_append({_STATE}, str kernel) -> ()", append_reference, _append)
READ: Op = define(f"kv_read({_READ}) -> (Tensor, Tensor)", read_reference, _read)
ATTEND: Op = define(f"kv_attend({_ATTEND}, str kernel) -> Tensor", attend_reference, _attend, tolerance=_FLOOR)
ATTEND_TURNED: Op = define(f"kv_attend_turned({_TURNED}, str kernel) -> Tensor", attend_turned_reference, _attend_turned, tolerance=_FLOOR)
APPEND.register(Provider("reference", "kv_append", "any", "pages", lambda p: YES, _opaque("kv_append_reference"), rank=-1))
ATTEND.register(Provider("reference", "kv_attend", "any", "pages", lambda p: YES, _opaque("kv_attend_reference"), rank=-1))
ATTEND_TURNED.register(Provider("reference", "kv_attend_turned", "any", "pages", lambda p: YES, _opaque("kv_attend_turned_reference"), rank=-1))
