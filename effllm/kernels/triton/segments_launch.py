"""Launch attention by segments, and its provider. The op is opaque to the compiler, so the number of segments may change at every call."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from effllm.kernels.triton.segments import packed_attention_kernel
from effllm.lowering.op import YES, Problem, Provider, Verdict
from effllm.lowering.packed_attention import SEGMENTS

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def tiles(queries: int, segments: int, repeat: int, size: int) -> dict[str, int]:
    """Rows and keys of a program, warps and stages. Mostly single queries: the least rows that tl.dot takes."""
    few = queries * repeat <= 16 * segments
    rows = max(16 if few else 64, triton.next_power_of_2(repeat))
    # accumulators of rows x size over 32 threads a warp must leave registers for scores and keys
    warps = (2 if size <= 64 else 4) if few else (4 if size <= 64 else 8)
    return {"BM": rows, "BN": 64 if size <= 64 or (size <= 128 and not few) else 32, "num_warps": warps, "num_stages": 2}


def attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, scale: float, window: int, softcap: float, how: dict[str, int] | None = None) -> Tensor:
    """(1, T, H, Dv); `how` overrides `tiles`."""
    heads, queries, size = q.shape[1:]
    value, groups, segments = v.shape[3], k.shape[1], table.shape[0]
    out = torch.zeros(1, queries, heads, value, dtype=q.dtype, device=q.device)
    if not segments or not queries:
        return out
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    how = how or tiles(queries, segments, heads // groups, max(size, value))
    per = how["BM"] // (heads // groups)
    constants: dict[str, Any] = {
        "R": heads // groups, "D": size, "DV": value, "DP": max(16, triton.next_power_of_2(size)), "DVP": max(16, triton.next_power_of_2(value)),
        "SP": triton.next_power_of_2(segments), "WINDOW": window > 0, "CAP": softcap > 0, "IEEE": q.dtype == torch.float32,
    }  # fmt: skip
    with torch.cuda.device_of(q):  # Triton launches on the current device; no effect on CPU tensors
        packed_attention_kernel[(triton.cdiv(queries, per) + segments, groups)](
            q, k, v, table.contiguous(), out, segments, heads, q.stride(1), q.stride(2), k.stride(1), k.stride(2), v.stride(1), v.stride(2),
            scale, softcap, window, **constants, **how,
        )  # fmt: skip
    return out


@torch.library.custom_op("effllm_triton::packed_attention", mutates_args=(), device_types="cuda")
def packed_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    """The op "packed_attention" (lowering/packed_attention.py)."""
    return attention(q, k, v, table, scale, window, softcap)


@packed_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, table: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    return q.new_empty(1, q.shape[2], q.shape[1], v.shape[3])


def supports(problem: Problem) -> Verdict:
    """Whether the kernel takes a problem; head sizes of 0 are unknown yet."""
    if problem.dtype not in _DTYPES:
        return Verdict(False, f"queries of {problem.dtype}, the kernel takes fp16, bf16 and fp32")
    if problem.k > 256:
        return Verdict(False, f"heads of {problem.k} channels, the kernel's registers hold 256")
    return YES


def register() -> None:
    """Add the provider "triton"; calling it again changes nothing."""
    SEGMENTS.register(Provider("triton", "packed_attention", "cuda", "dense", supports, packed_attention, rank=10))
