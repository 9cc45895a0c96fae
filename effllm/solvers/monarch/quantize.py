"""Monarch factors as bipolar-INT: the first factor, then the second fitted anew to what the first became, each in the metric of its inputs.

A group of columns lies within a block, so each block is a matrix of its own to the second-order solver: block i of w1 meets the inputs of
its columns, H_ii, and class o of w2 the outputs of the first stage, A_o H A_o^T. All blocks of a factor share one grid and one scale type.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from effllm.recipe import Bipolar
from effllm.runtime.formats import bipolar, monarch
from effllm.runtime.formats.base import Packed
from effllm.solvers import check
from effllm.solvers.gptq import gptq
from effllm.solvers.monarch.descend import refit
from effllm.solvers.monarch.factors import Factors
from effllm.solvers.monarch.metric import Metric
from effllm.solvers.monarch.project import diagonal
from effllm.solvers.search import choose, grouped, scale_dtype, search

_OFFSET = {"symmetric": "none", "integer": "integer", "affine": "affine"}


def quantize(w: Tensor, factors: Factors, metric: Metric | None, *, bits: int, group: int, offset: str = "auto") -> tuple[Packed, Packed]:
    """w1 and w2 as bipolar weights. `w` (N, K) fp64 is what the second factor is fitted to where there is a metric."""
    params = Bipolar(bits, group, offset)
    grid = factors.grid
    o, i, _, t = factors.left.shape
    w1, w2 = monarch.to_factors(factors.left, factors.right)
    first = _blocks(w1, i, params, None if metric is None else diagonal(metric, grid))
    if metric is None:
        return first, _blocks(w2, o, params, None)
    right = monarch.of_factors(bipolar.unpack(first).double(), w2, i, o)[1]
    left = refit(w, right, metric, factors)
    w2 = monarch.to_factors(left, right)[1]
    h = metric.padded(i * right.shape[-1])
    inputs = []
    for c in range(o):
        a = torch.block_diag(*right[c])
        inputs.append(a @ h @ a.t())
    return first, _blocks(w2, o, params, torch.stack(inputs).view(o, i * t, i * t))


def _blocks(w: Tensor, blocks: int, params: Bipolar, hessians: Tensor | None) -> Packed:
    """Stack the packed blocks of w (blocks * R, C); `hessians` (blocks, C, C)."""
    w = w.float().contiguous()
    check(w, params)
    dtype = scale_dtype(grouped(w, params.group), params.bits)
    fixed = replace(params, offset=_OFFSET[choose(w, params, dtype)])
    parts = w.view(blocks, -1, w.shape[1])
    if hessians is None:
        return search(w, fixed)
    return stack([gptq(part, fixed, h) for part, h in zip(parts, hessians, strict=True)])


def stack(parts: list[Packed]) -> Packed:
    """Bipolar weights of equal attributes one below the other; scales in fp32 where any of them needs it."""
    wide = torch.float32 if any(p.tensors["scale"].dtype == torch.float32 for p in parts) else torch.float16
    tensors = {"planes": torch.cat([p.tensors["planes"] for p in parts], 1)}
    for key in ("scale", "minimum"):
        if key in parts[0].tensors:
            tensors[key] = torch.cat([p.tensors[key].to(wide) for p in parts])
    packed = Packed(bipolar.name, bipolar.version, (sum(p.shape[0] for p in parts), parts[0].shape[1]), tensors, dict(parts[0].attrs))
    bipolar.validate(packed)
    return packed
