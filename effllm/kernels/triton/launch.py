"""Run the kernels: shapes and strides in, one or two launches, y out. No device query before the first call."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from effllm.autotune import use
from effllm.kernels.triton import choose
from effllm.kernels.triton.config import Tiles
from effllm.kernels.triton.gemm import gemm_kernel
from effllm.kernels.triton.gemv import gemv_kernel
from effllm.kernels.triton.splitk import reduce_kernel
from effllm.kernels.triton.unpack import dense_kernel
from effllm.lowering.op import Config, Problem

ONE = 0x3F800000  # fp32 1.0

_chosen: dict[tuple[object, ...], Tiles] = {}  # spares a call all but one lookup
use.on_forget(_chosen.clear)


def dense(codes: Tensor, scale: Tensor, minimum: Tensor | None, *, n: int, k: int, bits: int, group: int, zero: float, dtype: torch.dtype) -> Tensor:
    """The dense weight, transposed: (K, N) in `dtype`."""
    w = torch.empty(k, n, dtype=dtype, device=codes.device)
    blocks, width = codes.shape[0] // bits, codes.shape[1]
    grid = (triton.cdiv(k, 64), triton.cdiv(n, 64))
    dense_kernel[grid](codes, scale, minimum, w, n, k, width, blocks, zero, BITS=bits, GROUP=group, BK=64, BN=64, num_warps=4)
    return w


def _run(
    x: Tensor, xs: Tensor | None, codes: Tensor, scale: Tensor, minimum: Tensor | None, bias: Tensor | None, y: Tensor,
    config: Tiles, bits: int, group: int, zero: float,
) -> None:  # fmt: skip
    """Launch the kernels of `config`: x (M, K) with unit inner stride to y (M, N)."""
    (m, k), n, dtype = x.shape, y.shape[1], y.dtype
    if config.kind == "dense":
        torch.mm(x.to(dtype), dense(codes, scale, minimum, n=n, k=k, bits=bits, group=group, zero=zero, dtype=dtype), out=y)
        if bias is not None:
            y += bias
        return
    rows = None if xs is None else xs.reshape(-1).contiguous()
    bias = None if bias is None else bias.contiguous()
    blocks, width = codes.shape[0] // bits, codes.shape[1]
    tiles = triton.cdiv(triton.cdiv(blocks * 32, config.bk), config.split)
    target = y if config.split == 1 else torch.empty(config.split, m, n, dtype=torch.float32, device=x.device)
    tensors = (x, codes, scale, minimum, bias, rows, target)
    sizes = (m, n, k, width, blocks, x.stride(0), tiles, zero)
    constants = {"BITS": bits, "GROUP": group, "BN": config.bn, "BK": config.bk, "SPLIT": config.split, "STAGES": config.stages}
    if config.kind == "gemv":
        grid = (triton.cdiv(n, config.bn), config.split, triton.cdiv(m, config.bm))
        even = k % config.bk == 0 and blocks * 32 == k and width % config.bn == 0
        gemv_kernel[grid](*tensors, *sizes, ONE, **constants, WIDE=x.dtype == torch.float32, MB=config.bm, EVEN=even, num_warps=config.warps)
    else:
        tiles_mn = triton.cdiv(m, config.bm) * triton.cdiv(n, config.bn)
        gemm_kernel[(tiles_mn, config.split)](*tensors, *sizes, **constants, BM=config.bm, num_warps=config.warps)
    if config.split > 1:
        reduce_kernel[(triton.cdiv(n, 256), m)](target, bias, rows, y, m, n, SPLIT=config.split, BN=256, num_warps=2)


def choice(
    m: int, n: int, k: int, bits: int, group: int, affine: bool, x: torch.dtype, y: torch.dtype, scale: torch.dtype, device: torch.device
) -> Tiles:  # fmt: skip
    """What runs m rows of dtype `x` (int8: with row scales) to `y` where the caller asks for nothing; about a microsecond once known."""
    key = (m, n, k, bits, group, affine, x, y, scale, device)
    found = _chosen.get(key)
    if found is None:
        a8 = x == torch.int8
        op = "bipolar_linear_a8" if a8 else "bipolar_linear"
        problem = Problem(op, n, k, bits, group, affine, "a8" if a8 else "a16", m, y, str(device), scale)
        found = _chosen[key] = choose.tiles_for(problem)
    return found


def linear(
    x: Tensor, xs: Tensor | None, codes: Tensor, scale: Tensor, minimum: Tensor | None, bias: Tensor | None,
    *, n: int, bits: int, group: int, zero: float, dtype: torch.dtype, config: Config | Tiles | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x (..., K), with row scales xs (..., 1) where it is int8, times the packed weight: (..., N) in `dtype`.

    `config` overrides the choice (choose.py); `out` (M, N) is written in place of a new tensor, so that tests can poison it.
    """
    k = x.shape[-1]
    flat = x.reshape(-1, k)
    if flat.stride(-1) != 1 and k > 1:
        flat = flat.contiguous()
    m = flat.shape[0]
    y = torch.empty(m, n, dtype=dtype, device=x.device) if out is None else out
    if y.numel() == 0:
        return y.reshape(*x.shape[:-1], n)
    with torch.cuda.device_of(x):  # Triton launches on the current device; no effect on CPU tensors
        if config is None:
            tiles = choice(m, n, k, bits, group, minimum is not None, x.dtype, dtype, scale.dtype, x.device)
        else:
            tiles = config if isinstance(config, Tiles) else Tiles.of(config)
        _run(flat, xs, codes, scale, minimum, bias, y, tiles, bits, group, zero)
    return y.reshape(*x.shape[:-1], n)
