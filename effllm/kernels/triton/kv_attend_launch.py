"""Launch attention over a compressed cache: one kernel over the packed tokens and the ring, one that merges the splits. Reads no length on the host."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from effllm.kernels.triton import kv_cost
from effllm.kernels.triton.kv_bfp import kv_bfp_kernel
from effllm.kernels.triton.kv_bitmap import kv_bitmap_kernel
from effllm.kernels.triton.kv_kivi import kv_kivi_kernel
from effllm.kernels.triton.kv_matryoshka import kv_matryoshka_kernel
from effllm.kernels.triton.kv_parts import kv_merge_kernel
from effllm.runtime.caches.base import CacheFormat, parse
from effllm.runtime.caches.bfp import Bfp
from effllm.runtime.caches.gear import Gear
from effllm.runtime.caches.kivi import Kivi
from effllm.runtime.caches.matryoshka import Matryoshka
from effllm.runtime.caches.mustafar import Mustafar
from effllm.runtime.formats.kv import bitmap

LOG2E = 1.4426950408889634


def padded(n: int) -> int:
    """The next power of two, at least what a matrix product takes."""
    return max(16, triton.next_power_of_2(n))


def tile_of(tokens: int, dim: int) -> int:
    """Tokens of a tile: the largest power of two that divides `tokens`, at most what registers hold of heads of `dim` channels."""
    return min(64 if dim <= 128 else 32, tokens & -tokens)


@lru_cache(maxsize=256)
def kivi_constants(spec: str, heads: int, dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """A KIVI or GEAR record: sizes and byte offsets, by the names of the kernel's constants."""
    fmt = parse(spec)
    assert isinstance(fmt, Kivi)
    rank, factor, (nk, nv) = (fmt.rank, fmt.factors, fmt.counts(dim)) if isinstance(fmt, Gear) else (0, 16, (0, 0))
    at = fmt.layout(heads, dim, dtype).offsets()
    fields = {"KS": "kscale", "KM": "kmin", "VC": "vcodes", "VS": "vscale", "VM": "vmin", "KA": "ka", "KB": "kb", "VA": "va", "VB": "vb"}
    fields |= {"KI": "kidx", "KV": "kval", "VI": "vidx", "VV": "vval"}
    sizes = {"PAGE": fmt.page, "GROUP": fmt.group, "VG": fmt.vgroup(dim), "BITS": fmt.bits, "RANK": rank, "FACTOR": factor, "NK": nk, "NV": nv}
    return sizes | {"BT": tile_of(fmt.group, dim)} | {name: at.get(field, 0) for name, field in fields.items()}


@lru_cache(maxsize=256)
def mustafar_constants(spec: str, heads: int, dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """A Mustafar record."""
    fmt = parse(spec)
    assert isinstance(fmt, Mustafar)
    at = fmt.layout(heads, dim, dtype).offsets()
    places = {"KV": "kval", "KMAP": "kmap", "KS": "kscale", "VV": "vval", "VMAP": "vmap", "VS": "vscale"}
    sizes = {"PAGE": fmt.page, "KEEP": bitmap.keep_count(dim, fmt.sparsity), "BITS": fmt.bits, "BT": bitmap.TILE}
    return sizes | {name: at.get(field, 0) for name, field in places.items()}


@lru_cache(maxsize=256)
def bfp_constants(spec: str, heads: int, dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """A block-floating-point record."""
    fmt = parse(spec)
    assert isinstance(fmt, Bfp)
    at = fmt.layout(heads, dim, dtype).offsets()
    sizes = {"PAGE": fmt.page, "BLOCK": fmt.block, "KBITS": fmt.bits, "VBITS": fmt.vbits, "BT": tile_of(fmt.page, dim)}
    return sizes | {"KE": at["kexp"], "VC": at["vcodes"], "VE": at["vexp"]}


@lru_cache(maxsize=256)
def matryoshka_constants(spec: str, heads: int, dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """A Matryoshka page."""
    fmt = parse(spec)
    assert isinstance(fmt, Matryoshka)
    at, ranks = fmt.layout(heads, dim, dtype).offsets(), fmt.ranks(heads, dim)
    return {"PAGE": fmt.page, "RP": padded(max(map(max, ranks))), "BD": 32 if dim > 16 else 16, "VAT": at["v"], "BT": tile_of(fmt.page, dim)}


@lru_cache(maxsize=256)
def sides(spec: str, heads: int, dim: int, device: torch.device) -> Tensor:
    """int32 (2, G + 1): running sums of the ranks of keys and of values."""
    fmt = parse(spec)
    assert isinstance(fmt, Matryoshka)
    return torch.tensor([[0, *itertools.accumulate(r)] for r in fmt.ranks(heads, dim)], dtype=torch.int32, device=device)


Plan = tuple[Any, tuple[Tensor, ...], dict[str, Any]]  # kernel, its views of the pages and its tables, its constants


def _about(ring: Tensor, spec: str) -> tuple[str, int, int, torch.dtype]:
    return spec, ring.shape[2], ring.shape[4], ring.dtype


def _kivi(pages: Tensor, ring: Tensor, tables: list[Tensor], spec: str) -> Plan:
    return kv_kivi_kernel, (pages.view(torch.int32), pages.view(torch.float16), pages), kivi_constants(*_about(ring, spec))


def _mustafar(pages: Tensor, ring: Tensor, tables: list[Tensor], spec: str) -> Plan:
    constants = mustafar_constants(*_about(ring, spec))
    values = pages.view(ring.dtype) if constants["BITS"] == 16 else pages
    return kv_bitmap_kernel, (values, pages.view(torch.int32), pages.view(torch.float16), pages), constants


def _bfp(pages: Tensor, ring: Tensor, tables: list[Tensor], spec: str) -> Plan:
    return kv_bfp_kernel, (pages, *(t.contiguous() for t in tables)), bfp_constants(*_about(ring, spec))


def _matryoshka(pages: Tensor, ring: Tensor, tables: list[Tensor], spec: str) -> Plan:
    starts = sides(spec, ring.shape[2], ring.shape[4], ring.device)
    return kv_matryoshka_kernel, (pages.view(ring.dtype), *(t.contiguous() for t in tables), starts), matryoshka_constants(*_about(ring, spec))


KERNELS: dict[str, Callable[[Tensor, Tensor, list[Tensor], str], Plan]] = {
    "kivi": _kivi, "gear": _kivi, "mustafar": _mustafar, "bfp": _bfp, "matryoshka": _matryoshka
}  # fmt: skip


def rows_of(queries: int) -> int:
    """Columns of a tile for so many queries of a key head: eight are enough for the matrix cores of NVIDIA, AMD's take sixteen."""
    return max(16 if torch.version.hip else 8, triton.next_power_of_2(queries))


def mask_arguments(mask: Tensor | None, batch: int, heads: int, queries: int) -> tuple[Tensor | None, int, tuple[int, ...]]:
    """The mask as the kernels take it, its kind (kv_parts.masked) and its strides over batch, head, query and token."""
    if mask is None:
        return None, 0, (0, 0, 0, 0)
    wide = mask.expand(batch, heads, queries, mask.shape[3])
    boolean = mask.dtype == torch.bool
    kind = (1 if boolean else 2) + (2 if wide.stride()[1:3] == (0, 0) else 0)
    return (wide.view(torch.uint8) if boolean else wide), kind, wide.stride()


def attend(
    q: Tensor, pages: Tensor, ring: Tensor, lens: Tensor, tables: list[Tensor], mask: Tensor | None, scale: float, spec: str, splits: int = 0
) -> Tensor:  # fmt: skip
    """The op "kv_attend"; `splits` 0 leaves the number of programs a key head to the cost model."""
    fmt = parse(spec)
    batch, heads, count, dim = q.shape
    groups, width = ring.shape[2], ring.shape[3]
    repeat, lanes = heads // groups, batch * groups
    q = q if q.stride(3) == 1 else q.contiguous()
    rows = rows_of(repeat * count)
    splits = splits or kv_cost.splits(fmt, pages.shape[1], width, batch, groups, dim, rows, q.dtype, str(q.device))
    kernel, operands, constants = KERNELS[fmt.name](pages, ring, tables, spec)
    given, kind, strides = mask_arguments(mask, batch, heads, count)
    part = torch.empty(lanes, splits + 1, dim, rows, dtype=torch.float32, device=q.device)
    stats = torch.empty(lanes, splits + 1, 2, rows, dtype=torch.float32, device=q.device)
    out = torch.empty(batch, heads, count, dim, dtype=q.dtype, device=q.device)
    shape: dict[str, Any] = {"R": repeat, "Q": count, "D": dim, "BM": rows}
    with torch.cuda.device_of(q):  # Triton launches on the current device; no effect on CPU tensors
        kernel[(lanes, splits + 1)](
            q, *operands, ring, lens, given, part, stats, pages.shape[1], pages.shape[2], record_of(fmt, groups, dim, ring.dtype), groups, width,
            q.stride(0), q.stride(1), q.stride(2), *strides, scale * LOG2E,
            **shape, **constants, DP=padded(dim), MASK=kind, SPLITS=splits, **how(dim),
        )  # fmt: skip
        kv_merge_kernel[(lanes, triton.cdiv(dim, 32))](
            part, stats, out, groups, **shape, BD=32, SP=triton.next_power_of_2(splits + 1), SPLITS=splits, num_warps=2
        )
    return out


@lru_cache(maxsize=256)
def _record(spec: str, heads: int, dim: int, dtype: torch.dtype) -> int:
    layout = parse(spec).layout(heads, dim, dtype)
    return layout.record if layout.heads is not None else 0


def record_of(fmt: CacheFormat, heads: int, dim: int, dtype: torch.dtype) -> int:
    """Bytes from one key head's record to the next; 0 where all share one."""
    return _record(fmt.spec, heads, dim, dtype)


def how(dim: int, hip: bool = torch.version.hip is not None) -> dict[str, int]:
    """Warps and stages of a program: accumulators, a tile and its unpacked form must fit the registers, and a workgroup of AMD's 64 KiB."""
    return {"num_warps": 4 if dim <= 128 else 8, "num_stages": 1 if hip and dim > 128 else 2}
