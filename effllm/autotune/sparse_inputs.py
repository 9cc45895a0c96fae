"""Random operands of the ops of activation sparsity, in a provider's layout: see autotune/inputs.py.

Thresholds are set so that the problem's `density` of the channels is read, per row and to the nearest channel; scales and columns spread
over a wide range, so that a channel read at the wrong place cannot hide.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from effllm.autotune.inputs import Expected, Operands, copied
from effllm.errors import TuneError
from effllm.lowering.op import Problem
from effllm.runtime import layouts
from effllm.runtime.formats import bipolar


def weight(problem: Problem, g: torch.Generator) -> bipolar.Packed | Tensor:
    """A random (N, K) weight: packed where the problem has bits. Raises TuneError where no weight fits."""
    n, k, bits, group = problem.n, problem.k, problem.bits, problem.group
    about = dict(problem.detail)
    if not bits:
        values = getattr(torch, str(about.get("values", "")), None)
        if not isinstance(values, torch.dtype) or not values.is_floating_point:
            raise TuneError("E-TUN-SHAPE", f"{problem.op}: values {about.get('values')!r}", "make the problem with lowering.sparse_linear.problem")
        return (torch.randn(n, k, generator=g) * 2.0 ** torch.randint(-3, 3, (1, k), generator=g) / k**0.5).to(values)
    if not 1 <= bits <= 8 or group not in (bipolar.CHANNEL, *bipolar.GROUPS):
        raise TuneError("E-TUN-SHAPE", f"{problem.op}: bits={bits}, group={group}", f"bits is 1 to 8, group one of {(bipolar.CHANNEL, *bipolar.GROUPS)}")
    codes = torch.randint(0, 2**bits, (n, bipolar.padded(k, group)), generator=g, dtype=torch.uint8)
    count = bipolar.groups(k, group)
    scale = (torch.rand(n, count, generator=g) + 0.5) * 2.0 ** torch.randint(-6, 5, (n, count), generator=g) / 2**bits
    low = torch.randn(n, count, generator=g).to(problem.scale_dtype) if problem.affine else None
    return bipolar.make(codes, scale.to(problem.scale_dtype), low, k=k, bits=bits, group=group, grid="affine" if problem.affine else "symmetric")


def threshold_at(size: Tensor, density: float) -> Tensor:
    """A scalar threshold (1,) above which lies `density` of the magnitudes of `size`, to the nearest value; below zero for all of them."""
    ordered = size.float().flatten().sort(descending=True).values
    count = round(density * ordered.numel())
    return torch.full((1,), -1.0) if count >= ordered.numel() else ordered[count : count + 1].clone()


def sparse(problem: Problem, layout: str, copies: int, seed: int) -> Operands:
    """Operands of the sparse_* ops and rsparse_linear."""
    about = dict(problem.detail)
    density, limit, rank = float(about.get("density", 0.5)), int(about.get("limit", 4)), int(about.get("rank", 0))
    if not 0.0 <= density <= 1.0 or (problem.op == "rsparse_linear") != (rank > 0):
        raise TuneError("E-TUN-SHAPE", f"{problem.op}: density {density}, rank {rank}", "density lies in [0, 1], rank is positive for rsparse_linear alone")
    g = torch.Generator().manual_seed(seed)
    m, n, k = problem.m or 1, problem.n, problem.k
    w, up = weight(problem, g), problem.op.startswith("sparse_up")
    x = (torch.randn(m, k, generator=g) * 2.0 ** torch.randint(-3, 2, (m, 1), generator=g)).to(problem.dtype)
    gate = torch.randn(m, n, generator=g).to(problem.dtype)
    norm = 2.0 ** torch.randint(-2, 3, (k,), generator=g).float()
    size = gate.abs().float() if up else x.abs().float() * (norm if rank else 1.0)
    threshold = threshold_at(size, density)
    if up or not rank:  # the ops with one threshold per channel
        threshold = threshold.expand(size.shape[-1]).clone()
    active = ~(size <= threshold) if limit < 0 or m <= limit else torch.ones_like(size, dtype=torch.bool)
    bias = torch.randn(n, generator=g).to(problem.dtype)
    u = (torch.randn(n, rank, generator=g) / max(rank, 1) ** 0.5).to(problem.dtype)
    v = (torch.randn(rank, k, generator=g) / k**0.5).to(problem.dtype)

    head = (x, gate, threshold) if up else (x, threshold, norm) if rank else (x, threshold)
    if isinstance(w, Tensor):
        stored: tuple[Any, ...] = (w if up else w.t().contiguous(), *((u, v) if rank else ()))
        tail: tuple[Any, ...] = (bias,)
        dense = w.float()
    else:
        t = layouts.get(layout).repack(w)
        stored = (t["codes"], t["scale"], t.get("minimum"))
        zero = bipolar.zero_point(problem.bits, "affine" if problem.affine else "symmetric")
        tail = (bias, *(() if up else (n,)), problem.bits, problem.group, zero)
        dense = bipolar.unpack(w)

    def put(value: Any) -> Any:
        return value.to(problem.device) if isinstance(value, Tensor) else value

    def product(dtype: torch.dtype) -> Tensor:
        xs, wide = x.to(dtype), dense.to(dtype)
        if up:
            return torch.where(active, gate.to(dtype) * linear(xs, wide, bias.to(dtype)), 0.0)
        kept = torch.where(active, xs, 0.0)
        y = linear(kept, wide, bias.to(dtype))
        return y if not rank else y + linear(linear(torch.where(active, 0.0, xs), v.to(dtype)), u.to(dtype))

    args = tuple(put(value) for value in (*head, *stored, *tail, limit))
    nbytes = sum(t.numel() * t.element_size() for t in stored if t is not None)
    made = Operands([args], nbytes, lambda: [Expected(lambda y: y.reshape(-1, n).cpu(), product(torch.float64), product(problem.dtype))])
    return made if copies == 1 else copied(made, copies)
