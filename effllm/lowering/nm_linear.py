"""Ops of N:M weights: linear over kept values, over kept codes, and ARMOR's core between two block-diagonal wrappers.

    nm_linear          y = x @ W^T + bias           W (N, K) holds `keep` of every `of` consecutive inputs
    nm_bipolar_linear  the same, kept weights coded: 2 * scale * (u - zero) or 2 * scale * u + minimum, groups along the compressed axis
    armor_linear       y = A (S (B x)) + bias       S an N:M core with floating-point (`bits` 0) or coded values

Weights come in the layout of the named kernel (runtime/layouts/nm_*.py); "reference" reads nm_plain. Where autograd records, the ops are
plain torch over the same tensors, whatever the kernel: differentiable in x, in the floating-point values and in the wrappers, so a
masked weight is trained in its packed form and keeps its pattern.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effllm.autotune import nm_inputs
from effllm.lowering.bipolar_linear import plain, provider, run
from effllm.lowering.op import YES, Op, Problem, Provider, define, rows_of
from effllm.runtime import layouts
from effllm.runtime.formats import bipolar, nm


def core_weight(
    values: Tensor, scale: Tensor | None, minimum: Tensor | None, index: Tensor,
    *, n: int, k: int, keep: int, of: int, bits: int, group: int, zero: float, layout: str,
) -> Tensor:  # fmt: skip
    """The dense (N, K) weight behind packed tensors of a layout: in the values' dtype, fp32 for codes."""
    found = layouts.get(layout)
    columns = found.columns(index, n, k, keep, of, bits > 0)
    if scale is None:
        kept = found.values(values, n, k, keep, of)
    else:
        u, s, low = found.codes(values, scale, minimum, n=n, k=k, keep=keep, of=of, bits=bits, group=group)
        kept = bipolar.dequantize(u, s, low, zero, group)[:, : columns.shape[1]]
    return nm.expand(kept, columns, k, of)


def _linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, w.to(x.dtype), None if bias is None else bias.to(x.dtype))


def turn(x: Tensor, blocks: Tensor) -> Tensor:
    """x (..., R) through a block-diagonal matrix with blocks (B, d, d): block b of the result is blocks[b] x_b."""
    parts = x.reshape(-1, blocks.shape[0], blocks.shape[1]).transpose(0, 1)  # (B, M, d)
    return torch.bmm(parts, blocks.to(x.dtype).transpose(1, 2)).transpose(0, 1).reshape(x.shape)


def nm_linear_torch(x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, n: int, k: int, keep: int, of: int, layout: str = "nm_plain") -> Tensor:
    """x (..., K) times kept values, in x's dtype, in plain torch."""
    return _linear(x, core_weight(values, None, None, index, n=n, k=k, keep=keep, of=of, bits=0, group=0, zero=0.0, layout=layout), bias)


def nm_bipolar_linear_torch(
    x: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor | None, index: Tensor, bias: Tensor | None,
    n: int, k: int, keep: int, of: int, bits: int, group: int, zero: float, layout: str = "nm_plain",
) -> Tensor:  # fmt: skip
    """x (..., K) times kept codes, in x's dtype with fp32 weights rounded once, in plain torch."""
    w = core_weight(codes, scale, minimum, index, n=n, k=k, keep=keep, of=of, bits=bits, group=group, zero=zero, layout=layout)
    return _linear(x, w, bias)


def armor_linear_torch(
    x: Tensor, left: Tensor, values: Tensor, scale: Tensor | None, minimum: Tensor | None, index: Tensor, right: Tensor, bias: Tensor | None,
    n: int, k: int, keep: int, of: int, bits: int, group: int, zero: float, layout: str = "nm_plain",
) -> Tensor:  # fmt: skip
    """x (..., K) through the right wrapper, the core and the left wrapper, in x's dtype, in plain torch."""
    w = core_weight(values, scale, minimum, index, n=n, k=k, keep=keep, of=of, bits=bits, group=group, zero=zero, layout=layout)
    found = layouts.get(layout)
    y = turn(_linear(turn(x, found.wrapper(right)), w, None), found.wrapper(left))
    return y if bias is None else y + bias.to(x.dtype)


def trains(*tensors: Tensor | None) -> bool:
    """Whether autograd records an op on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _nm_linear(x, values, index, bias, n, k, keep, of, kernel):  # type: ignore[no-untyped-def]
    if trains(x, values, bias):
        return nm_linear_torch(x, values, index, bias, n, k, keep, of, provider("nm_linear", kernel).layout)
    return run("nm_linear", x, values, index, bias, n, k, keep, of, kernel)


def _nm_bipolar_linear(x, codes, scale, minimum, index, bias, n, k, keep, of, bits, group, zero, kernel):  # type: ignore[no-untyped-def]
    if trains(x, scale, minimum, bias):
        layout = provider("nm_bipolar_linear", kernel).layout
        return nm_bipolar_linear_torch(x, codes, scale, minimum, index, bias, n, k, keep, of, bits, group, zero, layout)
    return run("nm_bipolar_linear", x, codes, scale, minimum, index, bias, n, k, keep, of, bits, group, zero, kernel)


def _armor_linear(x, left, values, scale, minimum, index, right, bias, n, k, keep, of, bits, group, zero, kernel):  # type: ignore[no-untyped-def]
    if trains(x, left, None if bits else values, scale, minimum, right, bias):
        layout = provider("armor_linear", kernel).layout
        return armor_linear_torch(x, left, values, scale, minimum, index, right, bias, n, k, keep, of, bits, group, zero, layout)
    return run("armor_linear", x, left, values, scale, minimum, index, right, bias, n, k, keep, of, bits, group, zero, kernel)


def detail(keep: int, of: int, values: torch.dtype | None, block: int = 0) -> tuple[tuple[str, str | int | float], ...]:
    """What `Problem.detail` holds: the pattern, ARMOR's block size (0: none), and the dtype of floating-point values with its bytes."""
    stored = () if values is None else (("value_bytes", values.itemsize), ("values", str(values).removeprefix("torch.")))
    return tuple(sorted((("block", block), ("keep", keep), ("of", of), *stored)))


def problem(
    op: str, n: int, k: int, keep: int, of: int, *, m: int | None = 1, dtype: torch.dtype = torch.bfloat16, device: str = "cpu",
    values: torch.dtype | None = None, bits: int = 0, group: int = 0, affine: bool = False, scale_dtype: torch.dtype = torch.float16, block: int = 0,
) -> Problem:  # fmt: skip
    """The problem of a site, for `providers.select`: `values` for floating-point values, else `bits`, `group` and the rest."""
    return Problem(op, n, k, bits, group, affine, "a16", m, dtype, device, scale_dtype, detail(keep, of, values, block))


def _problem(
    op: str, x: Tensor, n: int, k: int, keep: int, of: int, values: Tensor, scale: Tensor | None, minimum: Tensor | None, bits: int, group: int, block: int
) -> Problem:
    return problem(
        op, n, k, keep, of, m=rows_of(x), dtype=x.dtype, device=x.device.type, values=None if bits else values.dtype, bits=bits, group=group,
        affine=minimum is not None, scale_dtype=torch.float16 if scale is None else scale.dtype, block=block,
    )  # fmt: skip


def _problem_nm(x, values, index, bias, n, k, keep, of, kernel):  # type: ignore[no-untyped-def]
    return _problem("nm_linear", x, n, k, keep, of, values, None, None, 0, 0, 0), plain(kernel)


def _problem_bipolar(x, codes, scale, minimum, index, bias, n, k, keep, of, bits, group, zero, kernel):  # type: ignore[no-untyped-def]
    return _problem("nm_bipolar_linear", x, n, k, keep, of, codes, scale, minimum, bits, group, 0), plain(kernel)


def block_size(stored: Tensor) -> int:
    """d of a wrapper in any layout."""
    return int(stored.shape[1] * 16 if stored.dim() == 5 else stored.shape[1])


def _problem_armor(x, left, values, scale, minimum, index, right, bias, n, k, keep, of, bits, group, zero, kernel):  # type: ignore[no-untyped-def]
    return _problem("armor_linear", x, n, k, keep, of, values, scale, minimum, bits, group, block_size(left)), plain(kernel)


_FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
_PATTERN = "int n, int k, int keep, int of"
_CODED = "int bits, int group, float zero"


def _define(schema: str, reference: Any, composite: Any, read: Any) -> Op:
    op = define(f"{schema} -> Tensor", reference, composite, tolerance=_FLOOR, inputs=nm_inputs.nm_linear, problem=read)
    op.register(Provider("reference", op.name, "any", "nm_plain", lambda p: YES, reference, rank=-1))
    return op


NM: Op = _define(f"nm_linear(Tensor x, Tensor values, Tensor index, Tensor? bias, {_PATTERN}, str kernel)", nm_linear_torch, _nm_linear, _problem_nm)
NM_BIPOLAR: Op = _define(
    f"nm_bipolar_linear(Tensor x, Tensor codes, Tensor scale, Tensor? minimum, Tensor index, Tensor? bias, {_PATTERN}, {_CODED}, str kernel)",
    nm_bipolar_linear_torch, _nm_bipolar_linear, _problem_bipolar,
)  # fmt: skip
ARMOR: Op = _define(
    "armor_linear(Tensor x, Tensor left, Tensor values, Tensor? scale, Tensor? minimum, Tensor index, Tensor right, Tensor? bias, "
    f"{_PATTERN}, {_CODED}, str kernel)",
    armor_linear_torch, _armor_linear, _problem_armor,
)  # fmt: skip
