"""Random operands of the Monarch ops (see inputs.py): factors with blocks of very different size, so that swapped blocks show."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effllm.autotune.inputs import Expected, Operands, copied
from effllm.errors import TuneError
from effllm.lowering.op import Problem
from effllm.runtime.formats import bipolar, monarch
from effllm.runtime.formats import dense as values
from effllm.runtime.formats.base import Packed

_ROWS = 16  # of the activations that are compared


def dense(problem: Problem, layout: str, copies: int, seed: int) -> Operands:
    """Operands of monarch_linear."""
    dtype = getattr(torch, str(dict(problem.detail).get("values") or "bfloat16"))

    def factor(w: Tensor) -> Packed:
        return values.make(w.to(dtype))

    return _operands(problem, layout, copies, seed, factor)


def quantized(problem: Problem, layout: str, copies: int, seed: int) -> Operands:
    """Operands of monarch_bipolar_linear: both factors of the problem's bits and group."""
    g = torch.Generator().manual_seed(seed + 1)
    bits, group = problem.bits, problem.group
    if not 1 <= bits <= 8 or group not in (bipolar.CHANNEL, *bipolar.GROUPS):
        raise TuneError("E-TUN-SHAPE", f"{problem.op}: bits={bits}, group={group}", f"bits is 1 to 8, group one of {(bipolar.CHANNEL, *bipolar.GROUPS)}")

    def factor(w: Tensor) -> Packed:
        (n, k), count = w.shape, bipolar.groups(w.shape[1], group)
        codes = torch.randint(0, 2**bits, (n, bipolar.padded(k, group)), generator=g, dtype=torch.uint8)
        scale = (torch.rand(n, count, generator=g) + 0.5) * 2.0 ** torch.randint(-4, 3, (n, count), generator=g) / 2**bits
        low = torch.randn(n, count, generator=g).to(problem.scale_dtype) if problem.affine else None
        grid = "affine" if problem.affine else "symmetric"
        return bipolar.make(codes, scale.to(problem.scale_dtype), low, k=k, bits=bits, group=group, grid=grid)

    return _operands(problem, layout, copies, seed, factor)


def _operands(problem: Problem, layout: str, copies: int, seed: int, factor: Any) -> Operands:
    from effllm.lowering import monarch_linear as ops

    g = torch.Generator().manual_seed(seed)
    d = dict(problem.detail)
    try:
        i, o, t = int(d["blocks_in"]), int(d["blocks_out"]), int(d["rank"])
    except KeyError as error:
        raise TuneError("E-TUN-SHAPE", f"{problem.op}: the problem has no {error}", "give blocks_in, blocks_out and rank as its detail") from error
    m, n, k = problem.m or 1, problem.n, problem.k
    s, p = monarch.sizes(n, k, i, o)
    w1 = torch.randn(i * o, t, p, generator=g) * 2.0 ** torch.randint(-3, 3, (i * o, t, 1), generator=g) / p**0.5
    w2 = torch.randn(o * s, i * t, generator=g) * 2.0 ** torch.randint(-3, 3, (o * s, 1), generator=g) / t**0.5
    whole = monarch.make(factor(w1.view(-1, p)), factor(w2), shape=(n, k), blocks_in=i, blocks_out=o, strided=bool(d.get("strided", 0)))
    x = (torch.randn(m, k, generator=g) * 2.0 ** torch.randint(-3, 2, (m, 1), generator=g)).to(problem.dtype)
    placed = [None if a is None else a.to(problem.device) for a in ops.operands(whole, layout)]
    args = (x.to(problem.device), *placed, None, *ops.scalars(whole))
    made = Operands([args], sum(a.numel() * a.element_size() for a in placed if a is not None), lambda: [_expected(whole, x, seed)])
    return made if copies == 1 else copied(made, copies)


def _expected(whole: Packed, x: Tensor, seed: int) -> Expected:
    """Rows of the output, the first and the last among them: the two stages in fp64, and in the dtype of x with plain torch."""
    from effllm.lowering import monarch_linear as ops

    m = x.shape[0]
    rows = torch.arange(m)
    if m > _ROWS:
        g = torch.Generator().manual_seed(seed + 2)
        rows = torch.unique(torch.cat([torch.tensor([0, m - 1]), torch.randint(0, m, (_ROWS,), generator=g)]))
    n, about = whole.shape[0], whole.attrs
    name = about["w1"]["format"]
    w1, w2 = (parts_of(whole, key, name) for key in ("w1", "w2"))
    sizes = (n, about["blocks_in"], about["blocks_out"], about["strided"])
    true = ops.reference(x[rows].double(), w1.double(), w2.double(), None, *sizes)
    plain = ops.reference(x[rows], w1, w2, None, *sizes)
    return Expected(lambda y: y.reshape(-1, n)[rows], true, plain)


def parts_of(whole: Packed, key: str, name: str) -> Tensor:
    """A factor's dense values in fp32."""
    from effllm.runtime.formats import parts

    part = parts.part(whole, key)
    return bipolar.unpack(part) if name == bipolar.name else values.unpack(part)


