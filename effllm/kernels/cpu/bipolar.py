"""The providers of bipolar-INT linears and of attention in decoding steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effllm.autotune import use
from effllm.kernels.cpu.build import Isa
from effllm.kernels.cpu.choose import CpuTuning, arguments, thresholds
from effllm.kernels.cpu.verdict import supports
from effllm.lowering.op import OPS, Config, Problem, Provider

NAMES = ("bipolar_linear", "bipolar_linear_a8", "bipolar_linear_many", "bipolar_linear_a8_many", "decode_attention")


def linear(x: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor | None, bias: Tensor | None, n: int, bits: int, group: int, zero: float,
           threads: int = 0, unpack_from: int = 0, expand_from: int = 0, rows: int = 0, tiles: int = 0, chunk: int = 0) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], n)


def linear_a8(xq, xs, codes, scale, minimum, bias, n, bits, group, zero, dtype, threads=0, unpack_from=0, rows=0, tiles=0, chunk=0):  # type: ignore[no-untyped-def]
    return xq.new_empty(*xq.shape[:-1], n, dtype=dtype)


def linear_many(x, codes, scale, minimum, bits, group, zero, threads=0, unpack_from=0, expand_from=0, rows=0, tiles=0, chunk=0):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], sum(c.shape[0] * 16 for c in codes))


def linear_a8_many(xq, xs, codes, scale, minimum, bits, group, zero, dtype, threads=0, unpack_from=0, rows=0, tiles=0, chunk=0):  # type: ignore[no-untyped-def]
    return xq.new_empty(*xq.shape[:-1], sum(c.shape[0] * 16 for c in codes), dtype=dtype)


def decode_attention(q, k, v, mask, scale):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape)


FAKES: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (linear, linear_a8, linear_many, linear_a8_many, decode_attention)}
use.on_forget(thresholds.cache_clear)


def register(isa: Isa, rank: int, ensure: Callable[[Isa], None]) -> None:
    """Add the providers of an instruction set; `ensure` builds and loads it on first use."""
    for op in NAMES:
        OPS[op].register(_provider(op, isa, rank, ensure))


def _provider(op: str, isa: Isa, rank: int, ensure: Callable[[Isa], None]) -> Provider:
    short = op.removeprefix("bipolar_")

    def run(*args: object, **more: object) -> Tensor:
        ensure(isa)
        y: Tensor = getattr(getattr(torch.ops, isa.namespace), short)(*args, **more)
        return y

    def tuned(*args: Any, problem: Problem, config: Config | None = None) -> Tensor:
        return run(*args, **arguments(problem, config, isa.name))

    attention = op == "decode_attention"
    tuning = None if attention else CpuTuning(isa.name)
    return Provider(f"cpu-{isa.name}", op, "cpu", "tile16", lambda p: supports(p, isa), run if attention else tuned, tuning, lambda: ensure(isa), rank=rank)
