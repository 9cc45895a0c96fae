"""Launch attention over turned keys, and its provider."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from effllm.kernels.triton import rotated_cost
from effllm.kernels.triton.kv_attend_launch import LOG2E, how, mask_arguments, padded, rows_of, tile_of
from effllm.kernels.triton.kv_parts import kv_merge_kernel
from effllm.kernels.triton.rotated import rotated_attention_kernel
from effllm.lowering.op import Problem, Provider, Verdict
from effllm.lowering.pie import ROTATED_ATTENTION, floats_only

QUERIES = 4  # beyond, turning the keys once is cheaper
COLUMNS = 64  # queries of all query heads of a key head in one program
CHANNELS = 128
TILE = 64  # keys


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, row: Tensor, cos: Tensor, sin: Tensor, layout: str, scale: float, splits: int = 0
) -> Tensor:  # fmt: skip
    """The op "rotated_attention"; `splits` 0 leaves the number of programs a key head to the cost model."""
    batch, heads, count, dim = q.shape
    groups, keys = k.shape[1], k.shape[2]
    repeat, lanes = heads // groups, batch * groups
    if count > 1 and repeat * count > COLUMNS:  # wide programs would not fit the registers
        few = max(1, COLUMNS // repeat)
        parts = [slice(i, i + few) for i in range(0, count, few)]
        own = [mask if mask is None or mask.shape[2] == 1 else mask[:, :, p] for p in parts]
        return torch.cat([attention(q[:, :, p], k, v, m, row, cos, sin, layout, scale, splits) for p, m in zip(parts, own, strict=True)], 2)
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    rows = rows_of(repeat * count)
    splits = (splits or rotated_cost.splits(keys, batch, groups, dim, rows, q.dtype, str(q.device))) - 1  # the kernels count from the last one
    given, kind, strides = mask_arguments(mask, batch, heads, count)
    part = torch.empty(lanes, splits + 1, dim, rows, dtype=torch.float32, device=q.device)
    stats = torch.empty(lanes, splits + 1, 2, rows, dtype=torch.float32, device=q.device)
    out = torch.empty(batch, heads, count, dim, dtype=q.dtype, device=q.device)
    shape: dict[str, Any] = {"R": repeat, "Q": count, "D": dim, "BM": rows}
    with torch.cuda.device_of(q):  # Triton launches on the current device; no effect on CPU tensors
        rotated_attention_kernel[(lanes, splits + 1)](
            q, k, v, given, row.contiguous(), cos.contiguous(), sin.contiguous(), part, stats, keys, groups, cos.shape[1],
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *strides, scale * LOG2E,
            **shape, DP=padded(dim), BT=tile_of(TILE, dim), MASK=kind, HALF=layout == "half", SPLITS=splits, **how(dim),
        )  # fmt: skip
        kv_merge_kernel[(lanes, triton.cdiv(dim, 32))](
            part, stats, out, groups, **shape, BD=32, SP=triton.next_power_of_2(splits + 1), SPLITS=splits, num_warps=2
        )
    return out


_LIBRARY = torch.library.Library("effllm_triton_rotated", "DEF")
_LIBRARY.define(
    "rotated_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor row, Tensor cos, Tensor sin, str layout, float scale) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("rotated_attention", attention, "CUDA")


@torch.library.register_fake("effllm_triton_rotated::rotated_attention")
def _fake(q, k, v, mask, row, cos, sin, layout, scale):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape)


def supports(problem: Problem) -> Verdict:
    """Whether the kernel takes a problem."""
    if problem.k > CHANNELS:
        return Verdict(False, f"heads of {problem.k} channels, the kernel's registers hold {CHANNELS}")
    if problem.m is None or problem.m > QUERIES:
        return Verdict(False, f"{'a dynamic number of' if problem.m is None else problem.m} queries: the kernel is for up to {QUERIES}")
    return floats_only(problem)


def register() -> None:
    """Add the provider "triton"; calling it again changes nothing."""
    call = torch.ops.effllm_triton_rotated.rotated_attention
    ROTATED_ATTENTION.register(Provider("triton", "rotated_attention", "cuda", "dense", supports, call, rank=10))
