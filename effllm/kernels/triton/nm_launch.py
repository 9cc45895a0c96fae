"""Run the 2:4 kernels: which one, with which tiles, and ARMOR's wrappers around it.

    M = 1           GEMV           the wrapper B is one small kernel before it, A the epilogue of each block of outputs
    2 <= M <= 16    GEMM           the same
    beyond          expansion      the dense weight for the time of one product of the vendor's library; wrappers as batched products
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from effllm.kernels.triton.nm import block_kernel, finish_kernel, nm_dense_kernel, nm_gemm_kernel, nm_gemv_kernel
from effllm.kernels.triton.splitk import reduce_kernel
from effllm.lowering.nm_linear import turn
from effllm.runtime.formats import armor

GEMM_ROWS = 16
WORD_ROWS = 4  # index words of a GEMV tile: 32 groups
GROUPS = 32  # of a GEMM tile
_PROGRAMS = 264  # two for each multiprocessor of a present server GPU


def splits(programs: int, steps: int) -> int:
    """Splits of K that give the GPU enough programs, a power of two with at least two steps each."""
    split = 1
    while split < 16 and programs * split < _PROGRAMS and steps >= 4 * split:
        split *= 2
    return split


def outputs(n: int, block: int, path: str) -> int:
    """Outputs of a tile: ARMOR's block; else 64, or 128 for a GEMV that has enough of them."""
    return block or (128 if path == "gemv" and n >= 128 * _PROGRAMS // 8 else 64)


def warps(bn: int, path: str) -> int:
    """Warps of a program: a GEMM tile of 128 outputs would take all registers of four."""
    return 8 if path == "gemm" and bn > 64 else 4


def dense(
    values: Tensor, scale: Tensor | None, minimum: Tensor | None, index: Tensor,
    *, n: int, k: int, bits: int, group: int, zero: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The dense weight, transposed: (K, N) in `dtype`."""
    w = torch.empty(k, n, dtype=dtype, device=values.device)
    groups, width = values.shape[1:]
    nm_dense_kernel[(triton.cdiv(groups, 16), triton.cdiv(n, 64))](
        values, scale, minimum, index, w, n, k, width, groups, zero, BITS=bits, GROUP=group, BH=16, BN=64, num_warps=4
    )
    return w


def linear(
    x: Tensor, values: Tensor, scale: Tensor | None, minimum: Tensor | None, index: Tensor, left: Tensor | None, right: Tensor | None, bias: Tensor | None,
    *, n: int, bits: int, group: int, zero: float, path: str = "", split: int = 0, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x (..., K) times the packed weight: (..., N) in x's dtype. `path` ("gemv", "gemm", "dense") and `split` override the choice."""
    k = x.shape[-1]
    flat = x.reshape(-1, k)
    if flat.stride(-1) != 1 and k > 1:
        flat = flat.contiguous()
    m = flat.shape[0]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device) if out is None else out
    if y.numel() == 0:
        return y.reshape(*x.shape[:-1], n)
    block = 0 if left is None else left.shape[1]
    bias = None if bias is None else bias.contiguous()
    path = path or ("gemv" if m == 1 else "gemm" if m <= GEMM_ROWS else "dense")
    with torch.cuda.device_of(x):  # Triton launches on the current device; no effect on CPU tensors
        if path == "dense":
            w = dense(values, scale, minimum, index, n=n, k=k, bits=bits, group=group, zero=zero, dtype=x.dtype)
            if left is None or right is None:
                torch.mm(flat, w, out=y)
            else:
                y.copy_(turn(torch.mm(turn(flat, armor.blocks(right)), w), armor.blocks(left)))
            if bias is not None:
                y += bias
            return y.reshape(*x.shape[:-1], n)
        if right is not None:
            u = torch.empty(m, k, dtype=x.dtype, device=x.device)
            block_kernel[(k // block, m)](flat, right, u, k, flat.stride(0), BLOCK=block, num_warps=4)
            flat = u
        groups, width = values.shape[1:]
        bn = outputs(n, block, path)
        step = 8 * WORD_ROWS if path == "gemv" else GROUPS
        steps = triton.cdiv(groups, step)
        tiles = triton.cdiv(n, bn)
        split = split or splits(tiles * (m if path == "gemv" else 1), steps)
        target = y if split == 1 else torch.empty(split, m, n, dtype=torch.float32, device=x.device)
        operands = (flat, values, scale, minimum, index, left, bias, target, m, n, k, width, groups, flat.stride(0), triton.cdiv(steps, split), zero)
        constants = {"BITS": bits, "GROUP": group, "BLOCK": block, "BN": bn, "SPLIT": split}
        if path == "gemv":
            nm_gemv_kernel[(tiles, split, m)](*operands, **constants, R=WORD_ROWS, num_warps=4)
        else:
            nm_gemm_kernel[(triton.cdiv(m, GEMM_ROWS) * tiles, split)](*operands, **constants, BM=GEMM_ROWS, BH=GROUPS, num_warps=warps(bn, path))
        if split > 1 and block:
            finish_kernel[(tiles, m)](target, left, bias, y, m, n, SPLIT=split, BLOCK=block, num_warps=4)
        elif split > 1:
            reduce_kernel[(triton.cdiv(n, 256), m)](target, bias, None, y, m, n, SPLIT=split, BN=256, num_warps=2)
    return y.reshape(*x.shape[:-1], n)
