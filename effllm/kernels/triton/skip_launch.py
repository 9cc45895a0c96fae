"""Run the kernels that skip channels: which tiles and splits. Calls of more rows than the limit, or than four, are plain torch products."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from effllm.kernels.triton.nm_launch import splits
from effllm.kernels.triton.skip import skip_input_kernel, skip_output_kernel, skip_rest_kernel
from effllm.kernels.triton.splitk import reduce_kernel
from effllm.runtime.layouts.input_major import width_of

ROWS = 4
OUTPUTS = 32  # that a program looks at before it reads rows


def few(x: Tensor, limit: int) -> bool:
    """Whether the kernels run a call: thresholds apply, and its rows are at most four."""
    m = x.numel() // max(1, x.shape[-1])
    return m <= ROWS and (limit < 0 or m <= limit)


def _flat(x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def listed(bits: int, group: int) -> int:
    """Channels that a program looks at before it reads weights: within one group of codes."""
    return min(128, group or 128) if bits else 128


def by_input(
    x: Tensor, threshold: Tensor, norm: Tensor | None, weight: Tensor, scale: Tensor | None, minimum: Tensor | None, u: Tensor | None, v: Tensor | None,
    bias: Tensor | None, *, n: int, bits: int = 0, group: int = 0, zero: float = 0.0, split: int = 0,
) -> Tensor:  # fmt: skip
    """x (..., K), at most four rows, to (..., n)."""
    flat, k = _flat(x), x.shape[-1]
    m = flat.shape[0]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y.reshape(*x.shape[:-1], n)
    threshold, width, bs, bn = threshold.contiguous(), width_of(bits) if bits else 0, listed(bits, group), 128
    each, rank = threshold.numel() > 1, 0 if v is None else v.shape[0]
    steps, tiles = triton.cdiv(k, bs), triton.cdiv(n, bn)
    split = split or splits(tiles * m, steps)
    bias = None if bias is None else bias.contiguous()
    with torch.cuda.device_of(x):
        z = None
        if v is not None:
            z = torch.empty(m, rank, dtype=torch.float32, device=x.device)
            skip_rest_kernel[(triton.cdiv(rank, 16), m)](flat, threshold, norm, v, z, k, flat.stride(0), rank, EACH=each, BK=128, BR=16, num_warps=4)
        target = y if split == 1 else torch.empty(split, m, n, dtype=torch.float32, device=x.device)
        skip_input_kernel[(tiles, split, m)](
            flat, threshold, norm, weight, scale, minimum, u, z, bias, target, m, n, k, flat.stride(0), weight.shape[1] if bits else 0,
            scale.shape[1] if scale is not None else 0, triton.cdiv(steps, split), rank, zero,
            EACH=each, BITS=width, GROUP=group, BS=bs, BK=bs // 4, BN=bn, BR=16, SPLIT=split, num_warps=4,
        )  # fmt: skip
        if split > 1:
            reduce_kernel[(triton.cdiv(n, 256), m)](target, bias, None, y, m, n, SPLIT=split, BN=256, num_warps=2)
    return y.reshape(*x.shape[:-1], n)


def by_output(
    x: Tensor, gate: Tensor, threshold: Tensor, weight: Tensor, scale: Tensor | None, minimum: Tensor | None, bias: Tensor | None,
    *, bits: int = 0, group: int = 0, zero: float = 0.0,
) -> Tensor:  # fmt: skip
    """x (..., K) and gate (..., N), at most four rows, to (..., N)."""
    flat, k, n = _flat(x), x.shape[-1], gate.shape[-1]
    y = torch.empty(flat.shape[0], n, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y.reshape(*x.shape[:-1], n)
    threshold, bk = threshold.contiguous(), min(32, group or 32) if bits else 128
    with torch.cuda.device_of(x):
        skip_output_kernel[(triton.cdiv(n, OUTPUTS), flat.shape[0])](
            flat, gate.reshape(-1, n).contiguous(), threshold, weight, scale, minimum, None if bias is None else bias.contiguous(), y, n, k, flat.stride(0),
            weight.shape[1] if bits else 0, scale.shape[1] if scale is not None else 0, zero,
            EACH=threshold.numel() > 1, BITS=width_of(bits) if bits else 0, GROUP=group, BK=bk, BS=OUTPUTS, BN=16, num_warps=4,
        )  # fmt: skip
    return y.reshape(*x.shape[:-1], n)
