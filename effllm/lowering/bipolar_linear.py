"""Ops of bipolar-INT weights: linear with 16-bit or 8-bit activations, the activation quantizer, and the embedding gather.

All take the weight as codes + scale (+ minimum) in the layout of the named kernel, and mean

    y = x @ W^T + bias,   W = 2 * scale * (u - zero)   or   2 * scale * u + minimum   (see runtime/formats/bipolar.py)

`kernel` names a provider; "reference" (layout planes) is the oracle and runs everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effllm.autotune import inputs, use
from effllm.errors import KernelError, nearest
from effllm.lowering import gradient
from effllm.lowering.op import OPS, YES, Op, Problem, Provider, define, rows_of
from effllm.runtime import layouts
from effllm.runtime.formats import bipolar


def quantize_activation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic symmetric int8 per token: x (..., K) to codes (..., K) int8 and scales (..., 1) fp32 with x ~ codes * scale.

    Plain torch on purpose: Inductor fuses it into the norm or activation function that made x.
    """
    xf = x.float()
    scale = xf.abs().amax(-1, keepdim=True).clamp_min(1e-30) * (1.0 / 127.0)
    return torch.round(xf * (1.0 / scale)).clamp(-127, 127).to(torch.int8), scale


def weight(codes: Tensor, scale: Tensor, minimum: Tensor | None, *, k: int, n: int, bits: int, group: int, zero: float, layout: str) -> Tensor:
    """The dense fp32 (N, K) weight behind packed tensors of a layout."""
    u, s, low = layouts.get(layout).rows(codes, scale, minimum, None, n=n, bits=bits, group=group)
    return bipolar.dequantize(u, s, low, zero, group)[:, :k]


def linear_reference(
    x: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor | None, bias: Tensor | None, n: int, bits: int, group: int, zero: float
) -> Tensor:
    """x (..., K) times the packed weight (layout planes), in x's dtype with fp32 weights rounded once."""
    w = weight(codes, scale, minimum, k=x.shape[-1], n=n, bits=bits, group=group, zero=zero, layout="planes")
    return torch.nn.functional.linear(x, w.to(x.dtype), None if bias is None else bias.to(x.dtype))


def linear_a8_reference(
    xq: Tensor, xs: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor | None, bias: Tensor | None,
    n: int, bits: int, group: int, zero: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """int8 activations (..., K) with scales (..., 1) times the packed weight (layout planes)."""
    w = weight(codes, scale, minimum, k=xq.shape[-1], n=n, bits=bits, group=group, zero=zero, layout="planes")
    y = torch.nn.functional.linear(xq.float(), w) * xs
    return (y if bias is None else y + bias.float()).to(dtype)


def embedding(
    ids: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor | None, n: int, k: int, bits: int, group: int, zero: float, dtype: torch.dtype, kernel: str
) -> Tensor:
    """Rows `ids` (...) of the packed weight as (..., K) in `dtype`."""
    flat = ids.reshape(-1)
    u, s, low = layouts.get(layout_of("bipolar_embedding", kernel)).rows(codes, scale, minimum, flat, n=n, bits=bits, group=group)
    rows = bipolar.dequantize(u, s, low, zero, group)[:, :k].to(dtype)
    return rows.contiguous().reshape(*ids.shape, k)  # padded columns leave a gap between rows


def provider(op: str, kernel: str) -> Provider:
    """The registered provider called `kernel`, which may carry a stamp (see `stamped`)."""
    kernel = plain(kernel)
    found = OPS[op].providers.get(kernel)
    if found is None:
        from effllm.lowering import providers

        for device in ("cpu", "cuda"):
            providers.load(device)
        found = OPS[op].providers.get(kernel)
    if found is None:
        raise KernelError("E-KRN-NAME", f"unknown kernel {kernel!r} for {op}", nearest(kernel, OPS[op].providers))
    return found


def stamped(provider: Provider) -> str:
    """The provider's name with a stamp of everything that its choice of a configuration depends on.

    Compilers cache graphs by the text of the ops before these decompose: without it a graph would keep the choices, and the calls,
    of an earlier store, calibration or version.
    """
    return provider.name if provider.tuning is None or provider.late else f"{provider.name}#{use.stamp(provider.device)}"


def plain(kernel: str) -> str:
    """The provider's name without its stamp."""
    return kernel.partition("#")[0]


def layout_of(op: str, kernel: str) -> str:
    """The layout that a kernel reads; the embedding gather reads any linear kernel's layout."""
    return provider("bipolar_linear" if op == "bipolar_embedding" else op, kernel).layout


def _problem(op: str, x: Tensor, n: int, bits: int, group: int, scale: Tensor, affine: bool, dtype: torch.dtype) -> Problem:
    act = "a8" if x.dtype == torch.int8 else "a16"
    return Problem(op, n, int(x.shape[-1]), bits, group, affine, act, rows_of(x), dtype, x.device.type, scale.dtype)


def _problem_linear(x, codes, scale, minimum, bias, n, bits, group, zero, kernel):  # type: ignore[no-untyped-def]
    return _problem("bipolar_linear", x, n, bits, group, scale, minimum is not None, x.dtype), plain(kernel)


def _problem_linear_a8(xq, xs, codes, scale, minimum, bias, n, bits, group, zero, dtype, kernel):  # type: ignore[no-untyped-def]
    return _problem("bipolar_linear_a8", xq, n, bits, group, scale, minimum is not None, dtype), plain(kernel)


def _problem_linear_many(x, codes, scale, minimum, bits, group, zero, kernel):  # type: ignore[no-untyped-def]
    n = sum(outputs("bipolar_linear_many", kernel, c) for c in codes)
    return _problem("bipolar_linear_many", x, n, bits, group, scale[0], bool(minimum), x.dtype), plain(kernel)


def _problem_linear_a8_many(xq, xs, codes, scale, minimum, bits, group, zero, dtype, kernel):  # type: ignore[no-untyped-def]
    n = sum(outputs("bipolar_linear_a8_many", kernel, c) for c in codes)
    return _problem("bipolar_linear_a8_many", xq, n, bits, group, scale[0], bool(minimum), dtype), plain(kernel)


def run(op: str, *args: Any) -> Tensor:
    """Call the provider that the last argument names; one that is tuned per graph gets the problem, and the configuration known to be best."""
    found, read = provider(op, args[-1]), OPS[op].problem
    if found.tuning is None or found.late or read is None:
        y: Tensor = found.call(*args[:-1])
        return y
    problem, _ = read(*args)
    y = found.call(*args[:-1], problem=problem, config=use.choose(found, problem).config)
    return y


def dense_linear(op: str, x: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor | None, bias: Tensor | None, n: int, bits: int, group: int, zero: float,
                 kernel: str) -> Tensor:  # fmt: skip
    """The product through the dense value of the weight, in plain torch ops: what autograd differentiates with respect to x and bias."""
    w = weight(codes, scale, minimum, k=x.shape[-1], n=n, bits=bits, group=group, zero=zero, layout=layout_of(op, kernel))
    return torch.nn.functional.linear(x, w.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _linear(x, codes, scale, minimum, bias, n, bits, group, zero, kernel):  # type: ignore[no-untyped-def]
    if gradient.wanted(x, scale, minimum, bias):
        return dense_linear("bipolar_linear", x, codes, scale, minimum, bias, n, bits, group, zero, kernel)
    return run("bipolar_linear", x, codes, scale, minimum, bias, n, bits, group, zero, kernel)


def _linear_a8(xq, xs, codes, scale, minimum, bias, n, bits, group, zero, dtype, kernel):  # type: ignore[no-untyped-def]
    return run("bipolar_linear_a8", xq, xs, codes, scale, minimum, bias, n, bits, group, zero, dtype, kernel)


def _linear_many(x, codes, scale, minimum, bits, group, zero, kernel):  # type: ignore[no-untyped-def]
    if gradient.wanted(x, scale, minimum):
        op = "bipolar_linear_many"
        low = list(minimum) or [None] * len(codes)
        each = zip(codes, scale, low, strict=True)
        return torch.cat([dense_linear(op, x, c, s, m, None, outputs(op, kernel, c), bits, group, zero, kernel) for c, s, m in each], -1)
    return run("bipolar_linear_many", x, codes, scale, minimum, bits, group, zero, kernel)


def _linear_a8_many(xq, xs, codes, scale, minimum, bits, group, zero, dtype, kernel):  # type: ignore[no-untyped-def]
    return run("bipolar_linear_a8_many", xq, xs, codes, scale, minimum, bits, group, zero, dtype, kernel)


def outputs(op: str, kernel: str, codes: Tensor) -> int:
    """Rows of a weight whose codes are in a kernel's layout; tiles are full where weights are merged."""
    return layouts.get(layout_of(op, kernel)).full_rows(codes)


def linear_many_reference(x: Tensor, codes: list[Tensor], scale: list[Tensor], minimum: list[Tensor], bits: int, group: int, zero: float) -> Tensor:
    """Several weights (layout planes) that share x (..., K): their outputs side by side, (..., sum of N)."""
    low: list[Tensor | None] = list(minimum) or [None] * len(codes)
    return torch.cat([linear_reference(x, c, s, m, None, c.shape[1], bits, group, zero) for c, s, m in zip(codes, scale, low, strict=True)], -1)


def linear_a8_many_reference(
    xq: Tensor, xs: Tensor, codes: list[Tensor], scale: list[Tensor], minimum: list[Tensor], bits: int, group: int, zero: float, dtype: torch.dtype
) -> Tensor:
    """Several weights (layout planes) that share int8 activations: their outputs side by side."""
    low: list[Tensor | None] = list(minimum) or [None] * len(codes)
    parts = [linear_a8_reference(xq, xs, c, s, m, None, c.shape[1], bits, group, zero, dtype) for c, s, m in zip(codes, scale, low, strict=True)]
    return torch.cat(parts, -1)


_FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
_WEIGHT = "Tensor codes, Tensor scale, Tensor? minimum"
LINEAR: Op = define(
    f"bipolar_linear(Tensor x, {_WEIGHT}, Tensor? bias, int n, int bits, int group, float zero, str kernel) -> Tensor",
    linear_reference,
    _linear,
    tolerance=_FLOOR,
    inputs=inputs.bipolar_linear,
    problem=_problem_linear,
)
LINEAR_A8: Op = define(
    f"bipolar_linear_a8(Tensor xq, Tensor xs, {_WEIGHT}, Tensor? bias, int n, int bits, int group, float zero, ScalarType dtype, str kernel) -> Tensor",
    linear_a8_reference,
    _linear_a8,
    tolerance=_FLOOR,
    inputs=inputs.bipolar_linear,
    problem=_problem_linear_a8,
)
QUANTIZE: Op = define("quantize_activation(Tensor x) -> (Tensor, Tensor)", quantize_activation, quantize_activation)
EMBEDDING: Op = define(
    f"bipolar_embedding(Tensor ids, {_WEIGHT}, int n, int k, int bits, int group, float zero, ScalarType dtype, str kernel) -> Tensor",
    embedding,
    embedding,
)
LINEAR.register(Provider("reference", "bipolar_linear", "any", "planes", lambda p: YES, linear_reference, rank=-1))
LINEAR_A8.register(Provider("reference", "bipolar_linear_a8", "any", "planes", lambda p: YES, linear_a8_reference, rank=-1))

# Merging needs a kernel that takes lists; the reference registers none, so that it keeps its ops apart.
LINEAR_MANY: Op = define(
    "bipolar_linear_many(Tensor x, Tensor[] codes, Tensor[] scale, Tensor[] minimum, int bits, int group, float zero, str kernel) -> Tensor",
    linear_many_reference,
    _linear_many,
    tolerance=_FLOOR,
    inputs=inputs.bipolar_linear,
    problem=_problem_linear_many,
)
LINEAR_A8_MANY: Op = define(
    "bipolar_linear_a8_many(Tensor xq, Tensor xs, Tensor[] codes, Tensor[] scale, Tensor[] minimum, int bits, int group, float zero, "
    "ScalarType dtype, str kernel) -> Tensor",
    linear_a8_many_reference,
    _linear_a8_many,
    tolerance=_FLOOR,
    inputs=inputs.bipolar_linear,
    problem=_problem_linear_a8_many,
)
