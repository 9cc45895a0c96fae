"""Launch the packing of pages that leave the dense window: which kernel writes a format's pages, with which constants. Reads no length on the host."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from effllm.kernels.triton.kv_attend_launch import padded, sides
from effllm.kernels.triton.kv_flush import kv_flush_kivi_kernel
from effllm.kernels.triton.kv_flush_bfp import kv_flush_bfp_kernel
from effllm.kernels.triton.kv_flush_bitmap import kv_flush_bitmap_kernel
from effllm.kernels.triton.kv_flush_gear import kv_flush_gear_kernel
from effllm.kernels.triton.kv_flush_matryoshka import kv_flush_matryoshka_kernel
from effllm.runtime.caches.base import CacheFormat, parse
from effllm.runtime.caches.bfp import Bfp
from effllm.runtime.caches.gear import Gear
from effllm.runtime.caches.kivi import Kivi
from effllm.runtime.caches.matryoshka import Matryoshka
from effllm.runtime.caches.mustafar import Mustafar
from effllm.runtime.formats.kv import bitmap

SCRATCH = 1 << 26  # bytes that one launch may borrow; the pages of a long prompt are packed by several

Where = tuple[Any, ...]  # ring, lens, start, tokens, pages, bytes a page and a record, key heads, width, limit, strides of k and of v


@lru_cache(maxsize=256)
def constants(spec: str, heads: int, dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """A format's sizes and byte offsets, by the names of its packing kernel's constants."""
    fmt = parse(spec)
    at = fmt.layout(heads, dim, dtype).offsets()
    return _SIZES[fmt.name](fmt, heads, dim, dtype) | {name: at.get(field, 0) for name, field in _PLACES[fmt.name].items()}


def warps_of(fmt: CacheFormat, dim: int) -> int:
    """Warps of a packing program."""
    if isinstance(fmt, Gear):
        return 8 if fmt.page * dim > 8192 else 4
    return 8 if isinstance(fmt, Mustafar) or dim > 128 else 4


def _kivi_sizes(fmt: CacheFormat, heads: int, dim: int, dtype: torch.dtype) -> dict[str, Any]:
    assert isinstance(fmt, Kivi)
    vgroup = fmt.vgroup(dim)
    wide = [triton.next_power_of_2(n) for n in (fmt.group, vgroup)]
    tile = max(16, 4096 // max(wide))
    return {"PAGE": fmt.page, "GROUP": fmt.group, "VG": vgroup, "GP": wide[0], "VGP": wide[1], "BN": min(64, tile), "BITS": fmt.bits}


def _gear_sizes(fmt: CacheFormat, heads: int, dim: int, dtype: torch.dtype) -> dict[str, Any]:
    assert isinstance(fmt, Gear)
    sizes, (nk, nv) = _kivi_sizes(fmt, heads, dim, dtype), fmt.counts(dim)
    del sizes["BN"]
    page, channels = padded(fmt.page), padded(dim)
    sizes |= {name: min(wide, max(16, 2048 // sizes[group])) for name, wide, group in (("KN", channels, "GP"), ("VN", page, "VGP"))}
    sizes |= {"PP": page, "DP": channels, "KROWS": min(page, max(1, 4096 // channels)), "VROWS": min(channels, max(1, 4096 // page))}
    more = {"RANK": fmt.rank, "RP": triton.next_power_of_2(max(1, fmt.rank)), "LOOPS": fmt.loops, "ROUNDS": fmt.rounds, "FACTOR": fmt.factors}
    return sizes | more | {"NK": nk, "NV": nv}


def _mustafar_sizes(fmt: CacheFormat, heads: int, dim: int, dtype: torch.dtype) -> dict[str, Any]:
    assert isinstance(fmt, Mustafar)
    low = {torch.bfloat16: 16, torch.float16: 13}.get(dtype, 0)  # bits of the magnitude as fp32 that are zero
    return {"PAGE": fmt.page, "KEEP": bitmap.keep_count(dim, fmt.sparsity), "BITS": fmt.bits, "LOW": low, "DP": padded(dim)}


def _bfp_sizes(fmt: CacheFormat, heads: int, dim: int, dtype: torch.dtype) -> dict[str, Any]:
    assert isinstance(fmt, Bfp)
    half = triton.next_power_of_2(max(1, dim // 2))
    sizes = {"PAGE": fmt.page, "HP": half, "BT": min(triton.next_power_of_2(fmt.page), max(1, 2048 // half)), "BLOCK": fmt.block}
    return sizes | {"KBITS": fmt.bits, "VBITS": fmt.vbits, "UP": fmt.rule == "raise"}


def _matryoshka_sizes(fmt: CacheFormat, heads: int, dim: int, dtype: torch.dtype) -> dict[str, Any]:
    assert isinstance(fmt, Matryoshka)
    rank = padded(max(map(max, fmt.ranks(heads, dim))))
    return {"PAGE": fmt.page, "BT": min(padded(fmt.page), max(16, 4096 // rank)), "RP": rank, "BD": 32 if dim > 16 and rank <= 128 else 16}


_SIZES: dict[str, Callable[[Any, int, int, torch.dtype], dict[str, Any]]] = {
    "kivi": _kivi_sizes, "gear": _gear_sizes, "mustafar": _mustafar_sizes, "bfp": _bfp_sizes, "matryoshka": _matryoshka_sizes
}  # fmt: skip
_KIVI = {"KS": "kscale", "KM": "kmin", "VC": "vcodes", "VS": "vscale", "VM": "vmin"}
_PLACES = {
    "kivi": _KIVI,
    "gear": _KIVI | {"KA": "ka", "KB": "kb", "VA": "va", "VB": "vb", "KI": "kidx", "KV": "kval", "VI": "vidx", "VV": "vval"},
    "mustafar": {"KV": "kval", "KMAP": "kmap", "KS": "kscale", "VV": "vval", "VMAP": "vmap", "VS": "vscale"},
    "bfp": {"KC": "kcodes", "KE": "kexp", "VC": "vcodes", "VE": "vexp"},
    "matryoshka": {"VAT": "v"},
}


def _about(fmt: CacheFormat, k: Tensor, ring: Tensor) -> tuple[dict[str, Any], int, int, int]:
    """Constants, lanes, channels and warps."""
    batch, groups, _, dim = k.shape
    return constants(fmt.spec, groups, dim, ring.dtype), batch * groups, dim, warps_of(fmt, dim)


def _kivi(fmt: CacheFormat, count: int, k: Tensor, v: Tensor, pages: Tensor, tables: list[Tensor], where: Where) -> None:
    how, lanes, dim, warps = _about(fmt, k, where[0])
    grid = (count, lanes, fmt.page // how["GROUP"] + dim // how["VG"])
    kv_flush_kivi_kernel[grid](k, v, pages.view(torch.int32), pages.view(torch.float16), *where, D=dim, **how, num_warps=warps)


def _gear(fmt: CacheFormat, count: int, k: Tensor, v: Tensor, pages: Tensor, tables: list[Tensor], where: Where) -> None:
    how, lanes, dim, warps = _about(fmt, k, where[0])
    long = max(fmt.page, dim)
    errors, room = fmt.page * dim + long, how["RANK"] * long  # numbers of a program
    each = min(count, max(1, SCRATCH // (2 * lanes * (4 * errors + 8 * room))))
    e = torch.empty(each * lanes * 2 * errors, dtype=torch.float32, device=k.device)
    q = torch.empty(each * lanes * 2 * room, dtype=torch.float64, device=k.device)
    views = (pages.view(torch.int32), pages.view(torch.float16), pages)
    for offset in range(0, count, each):
        grid = (min(each, count - offset), lanes, 2)
        kv_flush_gear_kernel[grid](k, v, *views, e, q, *where[:4], offset, *where[4:], D=dim, **how, num_warps=warps)


def _mustafar(fmt: CacheFormat, count: int, k: Tensor, v: Tensor, pages: Tensor, tables: list[Tensor], where: Where) -> None:
    how, lanes, dim, warps = _about(fmt, k, where[0])
    blocks, narrow = 2 * fmt.page // bitmap.TILE, how["BITS"]
    scratch = torch.empty(count * lanes * blocks * 64 * how["KEEP"] if narrow == 4 else 0, dtype=torch.uint8, device=k.device)
    values = pages.view(where[0].dtype) if narrow == 16 else pages
    views = (values, pages.view(torch.int64), pages.view(torch.float16), pages)
    kv_flush_bitmap_kernel[(count, lanes, blocks)](k, v, *views, scratch, *where, D=dim, **how, num_warps=warps)


def _bfp(fmt: CacheFormat, count: int, k: Tensor, v: Tensor, pages: Tensor, tables: list[Tensor], where: Where) -> None:
    how, lanes, dim, warps = _about(fmt, k, where[0])
    orders = [t.contiguous() for t in tables]
    kv_flush_bfp_kernel[(count, lanes, 2 * triton.cdiv(fmt.page, how["BT"]))](k, v, pages, *orders, *where, D=dim, **how, num_warps=warps)


def _matryoshka(fmt: CacheFormat, count: int, k: Tensor, v: Tensor, pages: Tensor, tables: list[Tensor], where: Where) -> None:
    how, lanes, dim, warps = _about(fmt, k, where[0])
    bases = [t.contiguous() for t in tables]
    views = (pages.view(where[0].dtype), *bases, sides(fmt.spec, k.shape[1], dim, k.device))
    grid = (count, lanes, 2 * triton.cdiv(fmt.page, how["BT"]))
    kv_flush_matryoshka_kernel[grid](k, v, *views, *where, D=dim, **how, num_warps=warps)


FLUSH: dict[str, Callable[[CacheFormat, int, Tensor, Tensor, Tensor, list[Tensor], Where], None]] = {
    "kivi": _kivi, "gear": _gear, "mustafar": _mustafar, "bfp": _bfp, "matryoshka": _matryoshka
}  # fmt: skip
