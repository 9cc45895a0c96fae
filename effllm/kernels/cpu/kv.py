"""The CPU providers of compressed caches: a fast append for every format, and attention over KIVI and GEAR pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effllm.kernels.cpu import kv_pack
from effllm.kernels.cpu.build import Isa
from effllm.kernels.cpu.kv_formats import PLAIN
from effllm.kernels.cpu.verdict import supports
from effllm.lowering.op import OPS, Problem, Provider, Verdict
from effllm.runtime.caches.base import CacheFormat, parse
from effllm.runtime.caches.gear import Gear
from effllm.runtime.caches.kivi import Kivi


def kv_kivi(q, pages, ring, lens, mask, scale, page, bits, group, rank, kout, vout, factors, row, cos, sin, half):  # type: ignore[no-untyped-def]
    """The op's fake."""
    return q.new_empty(q.shape)


FAKES: dict[str, Callable[..., Any]] = {kv_kivi.__name__: kv_kivi, **kv_pack.FAKES}


def settings(fmt: CacheFormat, dim: int) -> tuple[int, ...]:
    """page, bits, group, rank, exact entries a key channel and a value, bits of factors: what kv_kivi takes."""
    assert isinstance(fmt, Kivi)
    rank, counts, factors = (fmt.rank, fmt.counts(dim), fmt.factors) if isinstance(fmt, Gear) else (0, (0, 0), 16)
    return fmt.page, fmt.bits, fmt.group, rank, *counts, factors


def register(isa: Isa, rank: int, ensure: Callable[[Isa], None]) -> None:
    """Add one instruction set's providers."""

    def attend_verdict(problem: Problem) -> Verdict:
        name = dict(problem.detail)["format"]
        if name not in ("kivi", "gear"):
            return Verdict(False, f"{name} pages have no kernel here")
        return supports(problem, isa)

    def append(pages: Tensor, ring: Tensor, lens: Tensor, start: Tensor, k: Tensor, v: Tensor, tables: list[Tensor], spec: str) -> None:
        ensure(isa)
        kv_pack.append(getattr(torch.ops, isa.namespace), pages, ring, lens, start, k, v, tables, spec)

    def attend(q: Tensor, pages: Tensor, ring: Tensor, lens: Tensor, tables: list[Tensor], mask: Tensor | None, scale: float, spec: str) -> Tensor:
        ensure(isa)
        out: Tensor = getattr(torch.ops, isa.namespace).kv_kivi(q, pages, ring, lens, mask, scale, *settings(parse(spec), ring.shape[4]), *PLAIN)
        return out

    def turned(
        q: Tensor, pages: Tensor, ring: Tensor, lens: Tensor, tables: list[Tensor], mask: Tensor | None, row: Tensor, cos: Tensor, sin: Tensor, layout: str,
        scale: float, spec: str,
    ) -> Tensor:  # fmt: skip
        ensure(isa)
        turn = (row, cos, sin, layout == "half")
        out: Tensor = getattr(torch.ops, isa.namespace).kv_kivi(q, pages, ring, lens, mask, scale, *settings(parse(spec), ring.shape[4]), *turn)
        return out

    name = f"cpu-{isa.name}"
    OPS["kv_append"].register(Provider(name, "kv_append", "cpu", "pages", lambda p: supports(p, isa), append, None, lambda: ensure(isa), rank=rank))
    OPS["kv_attend"].register(Provider(name, "kv_attend", "cpu", "pages", attend_verdict, attend, None, lambda: ensure(isa), rank=rank))
    turned_provider = Provider(name, "kv_attend_turned", "cpu", "pages", attend_verdict, turned, None, lambda: ensure(isa), rank=rank)
    OPS["kv_attend_turned"].register(turned_provider)
