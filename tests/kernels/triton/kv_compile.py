"""Ahead-of-time compilation of the cache kernels as their launchers call them."""

from __future__ import annotations

from typing import Any

import torch

from effllm.kernels.triton import aot, kv_attend_launch, kv_flush_launch
from effllm.kernels.triton.kv_flush import kv_flush_kivi_kernel
from effllm.kernels.triton.kv_flush_bfp import kv_flush_bfp_kernel
from effllm.kernels.triton.kv_flush_bitmap import kv_flush_bitmap_kernel
from effllm.kernels.triton.kv_flush_gear import kv_flush_gear_kernel
from effllm.kernels.triton.kv_flush_matryoshka import kv_flush_matryoshka_kernel
from effllm.kernels.triton.kv_parts import kv_merge_kernel
from effllm.kernels.triton.kv_ring import kv_lens_kernel, kv_ring_kernel
from effllm.runtime.caches.base import parse

KIND = {
    torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32",
}  # fmt: skip
SIZES = ("P", "page_bytes", "record", "G", "W", "qb", "qh", "qq", "mb", "mh", "mq", "limit", "n", "B", "kb", "kg", "kt", "vb", "vg", "vt")
# format, head size, query heads per key head, queries, mask
ATTEND = (
    ("kivi(bits=4)", 128, 4, 1, 3), ("kivi(bits=8)", 128, 1, 4, 2), ("kivi(bits=2)", 256, 2, 1, 0), ("kivi(bits=4,group=16)", 80, 1, 1, 1),
    ("gear(bits=4,factors=8)", 64, 8, 4, 3), ("gear(bits=4,outliers=0.1)", 128, 4, 1, 3), ("mustafar(sparsity=0.7)", 256, 2, 1, 3),
    ("mustafar(sparsity=0.5,bits=4)", 64, 8, 1, 3), ("bfp(bits=4)", 128, 4, 1, 3), ("matryoshka(k=0.5,v=0.5)", 256, 2, 1, 3),
)  # fmt: skip
COUNTED = (
    "kivi(bits=4)", "kivi(bits=8)", "gear(bits=4)", "mustafar(sparsity=0.7)", "bfp(bits=4)", "bfp(bits=8,vbits=8)", "matryoshka(k=0.5,v=0.5)",
)  # fmt: skip
FLUSH = (
    ("kivi(bits=4)", 128), ("kivi(bits=8,page=128,group=128)", 256), ("mustafar(sparsity=0.7)", 128), ("mustafar(bits=4)", 64),
    ("gear(bits=4)", 128), ("gear(bits=2,page=128,group=128,rank=4,outliers=0.05,factors=8,rounds=2)", 128), ("bfp(bits=4)", 128),
    ("bfp(bits=8,vbits=3,block=16,rule=raise,page=48)", 80), ("matryoshka(k=0.5,v=0.5)", 128), ("matryoshka(k=full,v=0.5,page=48)", 256),
)  # fmt: skip
PACKING: dict[str, Any] = {
    "kivi": kv_flush_kivi_kernel, "gear": kv_flush_gear_kernel, "mustafar": kv_flush_bitmap_kernel, "bfp": kv_flush_bfp_kernel,
    "matryoshka": kv_flush_matryoshka_kernel,
}  # fmt: skip


def attend(
    spec: str, dim: int, repeat: int, queries: int, mask: int, target: str, dtype: torch.dtype = torch.bfloat16, ones: tuple[str, ...] = ()
) -> tuple[aot.Resources, Any]:
    """Attention over eight key heads of a cache in `dtype`; `ones` are sizes that are 1, which Triton makes constants."""
    fmt = parse(spec)
    pages = torch.zeros(1, 1, fmt.layout(8, dim, dtype).page, dtype=torch.uint8)
    ring = torch.zeros(1, 2, 8, fmt.window + fmt.page, dim, dtype=dtype)
    tables = {"bfp": [torch.zeros(8, dim, dtype=torch.int64)] * 2, "matryoshka": [torch.zeros(8, dim, dim), torch.zeros(8, dim)] * 2}.get(fmt.name, [])
    kernel, operands, constants = kv_attend_launch.KERNELS[fmt.name](pages, ring, tables, spec)
    names = kernel.arg_names[1 : kernel.arg_names.index("ring")]
    kinds = dict(zip(names, (KIND[t.dtype] for t in operands), strict=True)) | {"q": KIND[dtype], "ring": KIND[dtype], "lens": "*i64", "scale": "fp32"}
    kinds |= {"part": "*fp32", "stats": "*fp32"} | {n: "i32" for n in SIZES if n in kernel.arg_names}
    rows = max(16, kv_attend_launch.rows_of(repeat * queries)) if target.startswith("hip") else kv_attend_launch.rows_of(repeat * queries)
    shape = {"R": repeat, "Q": queries, "D": dim, "DP": kv_attend_launch.padded(dim), "BM": rows, "MASK": mask, "SPLITS": 16}
    if mask:
        kinds["mask"] = "*u8" if mask % 2 else KIND[dtype]
        shape["mk"] = 1
    else:
        kinds["mk"] = "i32"
    aligned = ("q", *names, "ring", "lens", "part", "stats", "page_bytes", "record", "qb", "qh", "qq")
    absent = {} if mask else {"mask": None}
    kinds = {name: kind for name, kind in kinds.items() if name not in ones}
    how = kv_attend_launch.how(dim, target.startswith("hip"))
    return aot.compile_for(kernel, kinds, constants | shape | absent | dict.fromkeys(ones, 1), target, aligned=aligned, **how)


def instructions(spec: str, dim: int, repeat: int, queries: int, mask: int) -> float:
    """Instructions of the loop on cuda:90 for each element of keys and values, tiles of 64 tokens."""
    from tests.kernels.triton.test_aot import loop_instructions

    _, compiled = attend(spec, dim, repeat, queries, mask, "cuda:90")
    return sum(loop_instructions(aot.sass(compiled)).values()) * kv_attend_launch.how(dim)["num_warps"] * 32 / (64 * dim * 2)


def append(spec: str, dim: int, target: str, dtype: torch.dtype = torch.bfloat16, ones: tuple[str, ...] = ()) -> list[aot.Resources]:
    """The flush of a format; with the first of FLUSH or `ones` also the ring, the lengths and the merge of attention."""
    fmt, kind = parse(spec), KIND[dtype]
    kinds = {"k": kind, "v": kind, "ring": kind, "lens": "*i64", "start": "*i64", "words": "*i64", "halves": "*fp16", "octets": "*u8", "scratch": "*u8"}
    kinds |= {"fault": "*i64", "values": kind if getattr(fmt, "bits", 16) == 16 else "*u8"} | dict.fromkeys(SIZES, "i32")
    kinds |= {"words": "*i64" if fmt.name == "mustafar" else "*i32", "errors": "*fp32", "sides": "*fp64", "korder": "*i64", "vorder": "*i64", "offset": "i32"}
    if fmt.name == "matryoshka":
        kinds |= {"values": kind, "sides": "*i32"} | dict.fromkeys(("uk", "mk", "uv", "mv"), "*fp32")
    kernel, constants = PACKING[fmt.name], kv_flush_launch.constants(spec, 8, dim, dtype)
    one = {"D": dim, "DP": kv_attend_launch.padded(dim), "BR": 16, "PAGE": fmt.page, "LAST": True}
    merge = {"R": 4, "Q": 1, "D": dim, "BM": 16, "BD": 32, "SP": 32, "SPLITS": 16}
    runs: tuple[Any, ...] = ((kernel, kinds, constants | {"D": dim}, kv_flush_launch.warps_of(fmt, dim)), (kv_ring_kernel, kinds, one, 4))
    runs += ((kv_lens_kernel, kinds, {"PAGE": fmt.page}, 1), (kv_merge_kernel, {"part": "*fp32", "stats": "*fp32", "out": kind, "G": "i32"}, merge, 2),)
    aligned = ("words", "halves", "octets", "values", "ring", "k", "v", "page_bytes", "record")
    fixed = dict.fromkeys(ones, 1)
    return [
        _compile(kernel, kinds, constants | {n: v for n, v in fixed.items() if n in kernel.arg_names}, target, warps, aligned)
        for kernel, kinds, constants, warps in (runs if ones or (spec, dim) == FLUSH[0] else runs[:1])
    ]


def _compile(kernel: Any, kinds: dict[str, str], constants: dict[str, Any], target: str, warps: int, aligned: tuple[str, ...]) -> aot.Resources:
    own = set(kernel.arg_names)
    types = {name: kind for name, kind in kinds.items() if name in own and name not in constants}
    return aot.compile_for(kernel, types, constants, target, num_warps=warps, aligned=tuple(n for n in aligned if n in types))[0]
