"""Which C++ op appends to a cache of which format: all but dense pages are packed natively, those by their own encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from effllm.kernels.cpu import kv_formats
from effllm.runtime.caches.base import parse
from effllm.runtime.caches.bfp import Bfp
from effllm.runtime.caches.gear import Gear
from effllm.runtime.caches.kivi import Kivi


def kv_append(pages, ring, lens, start, k, v, tables, spec, page) -> None:  # type: ignore[no-untyped-def]
    """The op's fake."""
    return None


def kv_append_kivi(pages, ring, lens, start, k, v, page, bits, group) -> None:  # type: ignore[no-untyped-def]
    """The op's fake."""
    return None


def kv_append_gear(pages, ring, lens, start, k, v, page, bits, group, rank, kout, vout, factors, loops, rounds) -> None:  # type: ignore[no-untyped-def]
    """The op's fake."""
    return None


def kv_append_bitmap(pages, ring, lens, start, k, v, page, keep, bits, kval, kmap, vval, vmap, kscale, vscale) -> None:  # type: ignore[no-untyped-def]
    """The op's fake."""
    return None


def kv_append_bfp(pages, ring, lens, start, k, v, korder, vorder, page, block, bits, vbits, up, kcodes, kexp, vcodes, vexp) -> None:  # type: ignore[no-untyped-def]
    """The op's fake."""
    return None


def kv_append_matryoshka(pages, ring, lens, start, k, v, uk, mk, uv, mv, page, kranks, vranks, kat, vat) -> None:  # type: ignore[no-untyped-def]
    """The op's fake."""
    return None


_OPS = (kv_append, kv_append_kivi, kv_append_gear, kv_append_bitmap, kv_append_bfp, kv_append_matryoshka)
FAKES: dict[str, Callable[..., None]] = {f.__name__: f for f in _OPS}


def _kivi(ops: Any, state: tuple[Tensor, ...], tables: list[Tensor], spec: str) -> None:
    fmt = parse(spec)
    assert isinstance(fmt, Kivi)
    ops.kv_append_kivi(*state, fmt.page, fmt.bits, fmt.group)


def _gear(ops: Any, state: tuple[Tensor, ...], tables: list[Tensor], spec: str) -> None:
    fmt, dim = parse(spec), state[1].shape[4]
    assert isinstance(fmt, Gear)
    settings = (fmt.page, fmt.bits, fmt.group, fmt.rank, *fmt.counts(dim), fmt.factors, fmt.loops, fmt.rounds)
    ops.kv_append_gear(*state, *settings)


def _mustafar(ops: Any, state: tuple[Tensor, ...], tables: list[Tensor], spec: str) -> None:
    ring = state[1]
    ops.kv_append_bitmap(*state, *kv_formats.mustafar(spec, ring.shape[2], ring.shape[4], ring.dtype))


def _bfp(ops: Any, state: tuple[Tensor, ...], tables: list[Tensor], spec: str) -> None:
    fmt, ring = parse(spec), state[1]
    assert isinstance(fmt, Bfp)
    page, block, bits, vbits, *at = kv_formats.bfp(spec, ring.shape[2], ring.shape[4], ring.dtype)
    ops.kv_append_bfp(*state, *tables, page, block, bits, vbits, fmt.rule == "raise", *at)


def _matryoshka(ops: Any, state: tuple[Tensor, ...], tables: list[Tensor], spec: str) -> None:
    ring = state[1]
    ops.kv_append_matryoshka(*state, *tables, *kv_formats.matryoshka(spec, ring.shape[2], ring.shape[4], ring.dtype))


PACKERS: dict[str, Callable[[Any, tuple[Tensor, ...], list[Tensor], str], None]] = {
    "kivi": _kivi, "gear": _gear, "mustafar": _mustafar, "bfp": _bfp, "matryoshka": _matryoshka
}  # fmt: skip


def append(ops: Any, pages: Tensor, ring: Tensor, lens: Tensor, start: Tensor, k: Tensor, v: Tensor, tables: list[Tensor], spec: str) -> None:
    """kv_append with the ops of one build: what leaves the dense window is packed by the format's C++ packer where there is one, else by its encoder."""
    fmt = parse(spec)
    packer = PACKERS.get(fmt.name)
    if packer is None:
        ops.kv_append(pages, ring, lens, start, k, v, tables, spec, fmt.page)
    else:
        packer(ops, (pages, ring, lens, start, k, v), tables, spec)
