"""Random operands of the N:M ops, in a provider's layout: see autotune/inputs.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effllm.autotune.inputs import Expected, Operands, copied
from effllm.errors import TuneError
from effllm.lowering.op import OPS, Problem
from effllm.runtime import formats, layouts
from effllm.runtime.formats import armor, bipolar, dense, nm
from effllm.runtime.formats.base import Packed
from effllm.runtime.layouts import nm_plain


def weight(problem: Problem, seed: int = 0) -> Packed:
    """A random weight of an N:M problem: every group keeps a random choice of columns, scales spread over ten powers of two.

    Raises TuneError (E-TUN-SHAPE) where the problem names no pattern or no values.
    """
    about = dict(problem.detail)
    keep, of, block = int(about.get("keep", 0)), int(about.get("of", 0)), int(about.get("block", 0))
    if of not in nm.WIDTHS or not 1 <= keep <= of or (problem.bits == 0) != ("values" in about):
        raise TuneError("E-TUN-SHAPE", f"{problem.op}: {dict(problem.detail)} with {problem.bits} bits", "make the problem with lowering.nm_linear.problem")
    g = torch.Generator().manual_seed(seed)
    n, k, group = problem.n, problem.k, problem.group
    groups = nm.padded(k, of) // of
    place = torch.rand(n, groups, of, generator=g).argsort(dim=-1)[..., :keep].sort(-1).values
    columns = (place + torch.arange(groups).view(1, -1, 1) * of).reshape(n, -1)
    kc = columns.shape[1]
    if problem.bits:
        codes = torch.randint(0, 2**problem.bits, (n, bipolar.padded(kc, group)), generator=g, dtype=torch.uint8)
        count = bipolar.groups(kc, group)
        scale = (torch.rand(n, count, generator=g) + 0.5) * 2.0 ** torch.randint(-6, 5, (n, count), generator=g) / 2**problem.bits
        low = torch.randn(n, count, generator=g).to(problem.scale_dtype) if problem.affine else None
        grid = "affine" if problem.affine else "symmetric"
        values = bipolar.make(codes, scale.to(problem.scale_dtype), low, k=kc, bits=problem.bits, group=group, grid=grid)
    else:
        spread = 2.0 ** torch.randint(-4, 4, (n, kc), generator=g)
        values = dense.make((torch.randn(n, kc, generator=g) * spread).to(getattr(torch, str(about["values"]))))
    core = nm.make(values, columns, k, keep, of)
    if not block:
        return core
    left, right = (torch.randn(rows, block, generator=g).to(torch.bfloat16) / block**0.5 for rows in (n, k))
    return armor.make(core, left, right)


def arguments(packed: Packed, op: str, layout: str, x: Tensor, bias: Tensor | None = None) -> tuple[Any, ...]:
    """An N:M op's arguments (without the kernel's name) for a packed weight."""
    core, _ = nm_plain.core_of(packed)
    part = core.attrs["values"]
    coded = part["format"] == bipolar.name
    t = {key: value.to(x.device) for key, value in layouts.get(layout).repack(packed).items()}
    sizes = (*packed.shape, core.attrs["n"], core.attrs["m"])
    a = part["attrs"]
    tail = (a["bits"], a["group"], bipolar.zero_point(a["bits"], a["grid"], a["source_bits"])) if coded else (0, 0, 0.0)
    scales = (t.get("scale"), t.get("minimum"))
    if op == "armor_linear":
        return (x, t["left"], t["values"], *scales, t["index"], t["right"], bias, *sizes, *tail)
    if op == "nm_bipolar_linear":
        return (x, t["values"], *scales, t["index"], bias, *sizes, *tail)
    return (x, t["values"], t["index"], bias, *sizes)


def nm_linear(problem: Problem, layout: str, copies: int, seed: int) -> Operands:
    """Operands of nm_linear, nm_bipolar_linear and armor_linear."""
    packed = weight(problem, seed)
    g = torch.Generator().manual_seed(seed + 1)
    m = problem.m or 1
    x = (torch.randn(m, problem.k, generator=g) * 2.0 ** torch.randint(-3, 2, (m, 1), generator=g)).to(problem.dtype)
    args = arguments(packed, problem.op, layout, x.to(problem.device))
    made = Operands([args], packed.nbytes, lambda: _expected(problem, packed, x))
    return made if copies == 1 else copied(made, copies)


def _expected(problem: Problem, packed: Packed, x: Tensor) -> list[Expected]:
    """The whole output; what plain torch computes is the masked dense product, for ARMOR its three products."""
    true = torch.nn.functional.linear(x.double(), formats.get(packed.format).unpack(packed, torch.float64))
    plain = OPS[problem.op].reference(*arguments(packed, problem.op, "nm_plain", x))
    return [Expected(lambda y: y.reshape(-1, problem.n).cpu(), true, plain)]
