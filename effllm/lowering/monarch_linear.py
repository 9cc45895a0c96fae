"""Ops of Monarch weights: a linear through two block-diagonal factors, dense or bipolar-INT (runtime/formats/monarch.py).

    z[o, i, r] = sum_p R[o, i, r, p] x[i, p],    y[o, s] = sum_{i, r} L[o, i, s, r] z[o, i, r] + bias

`w1` (I O t, p) and `w2` (O s, I t) are the stored matrices; x has K <= I p columns, y has n <= O s. With dense factors the op is
differentiable: where a gradient is wanted it is its reference, plain torch operations, in eager mode and in a traced graph alike.

Bipolar factors come in a layout per block (`operands`): each block's rows fill tiles of their own, so that a kernel can take it alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effllm.autotune import monarch_inputs, use
from effllm.lowering.bipolar_linear import plain, provider, weight
from effllm.lowering.op import OPS, YES, Op, Problem, Provider, define, rows_of
from effllm.runtime import layouts
from effllm.runtime.formats import bipolar, parts
from effllm.runtime.formats.base import Packed


def reference(
    x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor | None, n: int, blocks_in: int, blocks_out: int, strided: bool
) -> Tensor:  # fmt: skip
    """x (..., K) through dense factors, in x's dtype: two batched products, and one copy between them."""
    lead, p = x.shape[:-1], w1.shape[1]
    t = w1.shape[0] // (blocks_in * blocks_out)
    flat = x.reshape(-1, x.shape[-1])
    if blocks_in * p != x.shape[-1]:
        flat = torch.nn.functional.pad(flat, (0, blocks_in * p - x.shape[-1]))
    first = w1.to(x.dtype).view(blocks_in, blocks_out * t, p)
    second = w2.to(x.dtype).view(blocks_out, -1, blocks_in * t)
    z = torch.bmm(flat.view(-1, blocks_in, p).transpose(0, 1), first.transpose(1, 2))  # (I, M, O t)
    z = z.view(blocks_in, -1, blocks_out, t).permute(2, 1, 0, 3).reshape(blocks_out, -1, blocks_in * t)
    y = torch.bmm(z, second.transpose(1, 2))  # (O, M, s)
    y = y.permute(1, 2, 0) if strided else y.transpose(0, 1)
    y = y.reshape(flat.shape[0], blocks_out * second.shape[1])[:, :n].reshape(*lead, n)
    return y if bias is None else y + bias.to(x.dtype)


def bipolar_reference(
    x: Tensor, codes1: Tensor, scale1: Tensor, minimum1: Tensor | None, codes2: Tensor, scale2: Tensor, minimum2: Tensor | None,
    bias: Tensor | None, n: int, blocks_in: int, blocks_out: int, rank: int, strided: bool,
    bits1: int, group1: int, zero1: float, bits2: int, group2: int, zero2: float,
) -> Tensor:  # fmt: skip
    """x (..., K) through bipolar factors (layout planes): the dense values of both, then `reference`."""
    p, s = -(-x.shape[-1] // blocks_in), -(-n // blocks_out)
    first, second = blocks_in * blocks_out * rank, blocks_out * s
    w1 = weight(codes1, scale1, minimum1, k=p, n=first, bits=bits1, group=group1, zero=zero1, layout="planes")
    w2 = weight(codes2, scale2, minimum2, k=blocks_in * rank, n=second, bits=bits2, group=group2, zero=zero2, layout="planes")
    return reference(x, w1, w2, bias, n, blocks_in, blocks_out, strided)


def operands(packed: Packed, layout: str) -> tuple[Any, ...]:
    """The weight's arguments of its op, between x and bias: w1 and w2, or codes, scale and minimum of both in a kernel's layout."""
    first, second = parts.part(packed, "w1"), parts.part(packed, "w2")
    if first.format == "dense":
        return first.tensors["values"], second.tensors["values"]
    found: list[Tensor | None] = []
    for factor, blocks in ((first, packed.attrs["blocks_in"]), (second, packed.attrs["blocks_out"])):
        t = by_blocks(factor, blocks, layout)
        found += [t["codes"], t["scale"], t.get("minimum")]
    return tuple(found)


def scalars(packed: Packed) -> tuple[Any, ...]:
    """The weight's arguments of its op after bias, without the kernel."""
    a = packed.attrs
    if a["w1"]["format"] == "dense":
        return packed.shape[0], a["blocks_in"], a["blocks_out"], a["strided"]
    codes: list[Any] = []
    for key in ("w1", "w2"):
        about = a[key]["attrs"]
        codes += [about["bits"], about["group"], bipolar.zero_point(about["bits"], about["grid"], about["source_bits"])]
    return packed.shape[0], a["blocks_in"], a["blocks_out"], a["rank"], a["strided"], *codes


def by_blocks(factor: Packed, blocks: int, layout: str) -> dict[str, Tensor]:
    """A bipolar factor in a layout whose tiles never cross from one block of rows to the next; "planes" has no tiles."""
    repack = layouts.get(layout).repack
    if layout == "planes":
        return dict(repack(factor))
    rows = factor.shape[0] // blocks
    cut = [slice(b * rows, (b + 1) * rows) for b in range(blocks)]
    own = [{key: t[:, c] if key == "planes" else t[c] for key, t in factor.tensors.items()} for c in cut]
    made = [repack(Packed(factor.format, factor.version, (rows, factor.shape[1]), t, factor.attrs)) for t in own]
    return {key: torch.cat([m[key] for m in made]) for key in made[0]}


def detail(blocks_in: int, blocks_out: int, rank: int, strided: bool, values: str) -> tuple[tuple[str, str | int], ...]:
    """The sizes of a Monarch problem, sorted; `values` is the dtype of dense factors."""
    return (("blocks_in", blocks_in), ("blocks_out", blocks_out), ("rank", rank), ("strided", int(strided)), ("values", values))


def problem_of(packed: Packed, dtype: torch.dtype, device: str, m: int | None = None) -> Problem:
    """The problem of a stored weight with activations of `dtype`."""
    a, (n, k) = packed.attrs, packed.shape
    about = a["w1"]["attrs"]
    if a["w1"]["format"] == "dense":
        sizes = detail(a["blocks_in"], a["blocks_out"], a["rank"], a["strided"], _name(packed.tensors["w1.values"].dtype))
        return Problem("monarch_linear", n, k, 0, 0, False, "a16", m, dtype, device, detail=sizes)
    sizes = detail(a["blocks_in"], a["blocks_out"], a["rank"], a["strided"], "")
    scale, affine = packed.tensors["w1.scale"].dtype, "w1.minimum" in packed.tensors
    return Problem("monarch_bipolar_linear", n, k, about["bits"], about["group"], affine, "a16", m, dtype, device, scale, sizes)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _problem(x, w1, w2, bias, n, blocks_in, blocks_out, strided, kernel):  # type: ignore[no-untyped-def]
    rank = int(w1.shape[0]) // (blocks_in * blocks_out)
    sizes = detail(blocks_in, blocks_out, rank, strided, _name(w1.dtype))
    return Problem("monarch_linear", n, int(x.shape[-1]), 0, 0, False, "a16", rows_of(x), x.dtype, x.device.type, detail=sizes), plain(kernel)


def _problem_bipolar(  # type: ignore[no-untyped-def]
    x, codes1, scale1, minimum1, codes2, scale2, minimum2, bias, n, blocks_in, blocks_out, rank, strided, bits1, group1, zero1, bits2, group2, zero2, kernel
):
    sizes = detail(blocks_in, blocks_out, rank, strided, "")
    affine = minimum1 is not None
    k = int(x.shape[-1])
    return Problem("monarch_bipolar_linear", n, k, bits1, group1, affine, "a16", rows_of(x), x.dtype, x.device.type, scale1.dtype, sizes), plain(kernel)


def _run(op: str, *args: Any) -> Tensor:
    """Call the provider that the last argument names, with the configuration known to be best."""
    found, read = provider(op, args[-1]), OPS[op].problem
    if found.tuning is None or found.late or read is None:
        y: Tensor = found.call(*args[:-1])
        return y
    problem, _ = read(*args)
    y = found.call(*args[:-1], problem=problem, config=use.choose(found, problem).config)
    return y


def _linear(x, w1, w2, bias, n, blocks_in, blocks_out, strided, kernel):  # type: ignore[no-untyped-def]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w1, w2, bias)):
        return reference(x, w1, w2, bias, n, blocks_in, blocks_out, strided)
    return _run("monarch_linear", x, w1, w2, bias, n, blocks_in, blocks_out, strided, kernel)


def _bipolar(*args):  # type: ignore[no-untyped-def]
    return _run("monarch_bipolar_linear", *args)


# relative; the second stage reads sums that were rounded once to the output's dtype where there are many rows
_FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
_SIZES = "int n, int blocks_in, int blocks_out"
LINEAR: Op = define(
    f"monarch_linear(Tensor x, Tensor w1, Tensor w2, Tensor? bias, {_SIZES}, bool strided, str kernel) -> Tensor",
    reference,
    _linear,
    tolerance=_FLOOR,
    inputs=monarch_inputs.dense,
    problem=_problem,
)
BIPOLAR: Op = define(
    "monarch_bipolar_linear(Tensor x, Tensor codes1, Tensor scale1, Tensor? minimum1, Tensor codes2, Tensor scale2, Tensor? minimum2, Tensor? bias, "
    f"{_SIZES}, int rank, bool strided, int bits1, int group1, float zero1, int bits2, int group2, float zero2, str kernel) -> Tensor",
    bipolar_reference,
    _bipolar,
    tolerance=_FLOOR,
    inputs=monarch_inputs.quantized,
    problem=_problem_bipolar,
)
LINEAR.register(Provider("reference", "monarch_linear", "any", "dense", lambda p: YES, reference, rank=-1))
BIPOLAR.register(Provider("reference", "monarch_bipolar_linear", "any", "planes", lambda p: YES, bipolar_reference, rank=-1))
