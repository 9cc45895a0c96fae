"""The graph ops `effllm_triton::kv_append` and `kv_attend`, and the providers over them, with what they refuse."""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.autotune.kv_cost import PREDICTORS
from effllm.kernels.triton import kv_append_launch, kv_attend_launch, kv_cost, kv_flush_launch
from effllm.lowering.kv_cache import APPEND, ATTEND
from effllm.lowering.op import YES, Problem, Provider, Verdict
from effllm.runtime.caches.base import CacheFormat, parse
from effllm.runtime.caches.bfp import Bfp
from effllm.runtime.caches.gear import Gear
from effllm.runtime.caches.kivi import Kivi
from effllm.runtime.caches.mustafar import Mustafar

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
QUERIES = 4  # beyond, dense products on decoded keys and values win
COLUMNS = 64  # queries of all query heads of a key head
CHANNELS = 256
EXACT = 16  # outliers of a channel or token, each a compare with every element
RANK = 8

_LIBRARY = torch.library.Library("effllm_triton_kv", "DEF")
_LIBRARY.define(
    "kv_append(Tensor(a!) pages, Tensor(b!) ring, Tensor(c!) lens, Tensor start, Tensor k, Tensor v, Tensor[] tables, str spec) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "kv_attend(Tensor q, Tensor pages, Tensor ring, Tensor lens, Tensor[] tables, Tensor? mask, float scale, str spec) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def attend(q: Tensor, pages: Tensor, ring: Tensor, lens: Tensor, tables: list[Tensor], mask: Tensor | None, scale: float, spec: str) -> Tensor:
    """kv_attend. Raises CacheError (E-KVC-FULL) where an append before it did not fit."""
    kv_append_launch.check(ring.device)
    return kv_attend_launch.attend(q, pages, ring, lens, tables, mask, scale, spec)


_LIBRARY.impl("kv_append", kv_append_launch.append, "CUDA")
_LIBRARY.impl("kv_attend", attend, "CUDA")


@torch.library.register_fake("effllm_triton_kv::kv_append")
def _append_fake(pages, ring, lens, start, k, v, tables, spec) -> None:  # type: ignore[no-untyped-def]
    return None


@torch.library.register_fake("effllm_triton_kv::kv_attend")
def _attend_fake(q, pages, ring, lens, tables, mask, scale, spec):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape)


def _format(problem: Problem) -> CacheFormat:
    return parse(str(dict(problem.detail)["spec"]))


def supports_append(problem: Problem) -> Verdict:
    """Whether a format's pages are packed by a kernel."""
    fmt = _format(problem)
    if fmt.name not in kv_flush_launch.FLUSH:
        return Verdict(False, f"{fmt.name} pages have no packing kernel: plain torch packs them and reads the lengths on the host")
    if problem.dtype not in _DTYPES:
        return Verdict(False, f"keys are {problem.dtype}, the kernels take fp16, bf16 and fp32")
    if problem.k > CHANNELS:
        return Verdict(False, f"heads of {problem.k} channels, the kernels' registers hold {CHANNELS}")
    if isinstance(fmt, Kivi) and max(fmt.group, fmt.vgroup(problem.k)) > 256:
        return Verdict(False, f"groups of {fmt.group}, the kernel's registers hold 256")
    if isinstance(fmt, Gear) and fmt.rank > RANK:
        return Verdict(False, f"rank {fmt.rank}, the kernel's registers hold factors of {RANK}")
    return YES


def supports_attend(problem: Problem) -> Verdict:
    """Whether a kernel attends to a format's pages for so many queries."""
    fmt, heads = _format(problem), int(dict(problem.detail)["heads"])
    if fmt.name not in kv_attend_launch.KERNELS:
        return Verdict(False, f"{fmt.name} pages have no kernel here")
    if problem.dtype not in _DTYPES:
        return Verdict(False, f"queries are {problem.dtype}, the kernels take fp16, bf16 and fp32")
    if problem.k > CHANNELS:
        return Verdict(False, f"heads of {problem.k} channels, the kernels' registers hold {CHANNELS}")
    if problem.m is None or problem.m > QUERIES:
        return Verdict(False, f"{'a dynamic number of' if problem.m is None else problem.m} queries: the kernel is for up to {QUERIES}")
    if problem.m * heads // max(1, problem.n) > COLUMNS:
        return Verdict(False, f"{problem.m} queries of {heads // max(1, problem.n)} heads for each key head: a program holds {COLUMNS}")
    if isinstance(fmt, Gear) and (fmt.rank > RANK or max(fmt.counts(problem.k)) > EXACT):
        return Verdict(False, f"rank {fmt.rank} and {fmt.counts(problem.k)} outliers a vector, the kernel takes {RANK} and {EXACT}")
    return _tiles(fmt, problem.k)


def _tiles(fmt: CacheFormat, dim: int) -> Verdict:
    """Whether pages and blocks cut into tiles."""
    if not isinstance(fmt, Kivi | Mustafar) and kv_attend_launch.tile_of(fmt.page, dim) < 16:
        return Verdict(False, f"pages of {fmt.page} tokens, the kernel takes multiples of 16")
    if isinstance(fmt, Bfp):
        if fmt.block & (fmt.block - 1) and fmt.block != dim:
            return Verdict(False, f"blocks of {fmt.block} channels, the kernel takes powers of two")
        if min(fmt.bits, fmt.vbits) <= 4 and fmt.block != dim and dim // 2 % fmt.block:
            return Verdict(False, f"blocks of {fmt.block} of {dim} channels: a block of packed codes straddles the halves")
    return YES


def register() -> None:
    """Add the provider "triton" to the cache ops; calling it again changes nothing."""
    ops = torch.ops.effllm_triton_kv
    PREDICTORS["cuda"] = kv_cost.decision
    APPEND.register(Provider("triton", "kv_append", "cuda", "pages", supports_append, ops.kv_append, rank=10))
    ATTEND.register(Provider("triton", "kv_attend", "cuda", "pages", supports_attend, ops.kv_attend, rank=10))
