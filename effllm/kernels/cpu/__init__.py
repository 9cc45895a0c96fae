"""C++ kernels against PyTorch's stable ABI, built at first use: AVX-512 VNNI, AVX2, and portable C++."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effllm.autotune import use
from effllm.errors import KernelError
from effllm.kernels.cpu import build, kv, kv_formats, lowrank, lowrank_bipolar, monarch, nm, pie, segments, skip
from effllm.kernels.cpu.build import ISAS, Isa
from effllm.kernels.cpu.choose import CpuTuning, arguments, thresholds
from effllm.lowering.op import OPS, Config, Problem, Provider, Verdict

_loaded: set[str] = set()
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def ensure(isa: Isa) -> None:
    """Build and load one instruction set's ops, and give them fakes."""
    if isa.name in _loaded:
        return
    lacking = build.missing(isa)
    if lacking:
        raise KernelError("E-KRN-ISA", f"this processor lacks {', '.join(lacking)}", "use another kernel")
    torch.ops.load_library(str(build.build(isa)))

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

    fakes: tuple[Any, ...] = (decode_attention, linear, linear_a8, linear_many, linear_a8_many, *monarch.FAKES, *nm.fakes())
    fakes += (*skip.fakes(), *kv.FAKES, *kv_formats.FAKES, *pie.FAKES)
    for fake in fakes:
        torch.library.register_fake(f"{isa.namespace}::{fake.__name__}", fake)
    torch.library.register_fake(f"{isa.namespace}::lowrank", lowrank.fake)
    torch.library.register_fake(f"{isa.namespace}::lowrank_bipolar", lowrank_bipolar.fake)
    torch.library.register_fake(f"{isa.namespace}::packed_attention", segments.fake)
    _loaded.add(isa.name)


def supports(problem: Problem, isa: Isa) -> Verdict:
    """Whether this machine and this problem fit the build."""
    lacking = build.missing(isa)
    if lacking:
        return Verdict(False, f"processor lacks {', '.join(lacking)}")
    if problem.dtype not in _FLOATS:
        return Verdict(False, f"activations are {problem.dtype}, not float32, bfloat16 or float16")
    return Verdict(True)


def _provider(op: str, isa: Isa, rank: int) -> Provider:
    short = op.removeprefix("bipolar_")

    def run(*args: object, **more: object) -> Tensor:
        ensure(isa)
        y: Tensor = getattr(getattr(torch.ops, isa.namespace), short)(*args, **more)
        return y

    def linear(*args: Any, problem: Problem, config: Config | None = None) -> Tensor:
        return run(*args, **arguments(problem, config, isa.name))

    attention = op == "decode_attention"
    tuning = None if attention else CpuTuning(isa.name)
    return Provider(f"cpu-{isa.name}", op, "cpu", "tile16", lambda p: supports(p, isa), run if attention else linear, tuning, lambda: ensure(isa), rank=rank)


def _monarch(op: str, isa: Isa, rank: int) -> Provider:
    def verdict(problem: Problem) -> Verdict:
        why = monarch.refusal(problem)
        return Verdict(False, why) if why else supports(problem, isa)

    def call(*args: Any, problem: Problem, config: Config | None = None) -> Tensor:
        ensure(isa)
        y: Tensor = getattr(getattr(torch.ops, isa.namespace), op)(*args, **monarch.arguments(problem, config, isa.name))
        return y

    return Provider(f"cpu-{isa.name}", op, "cpu", monarch.LAYOUTS[op], verdict, call, monarch.MonarchTuning(isa.name), lambda: ensure(isa), rank=rank)


def register() -> None:
    """Add the CPU providers to the ops. Builds nothing yet."""
    use.on_forget(thresholds.cache_clear)
    for cached in (lowrank.products_from, lowrank_bipolar.thresholds, monarch.matmul_from):
        use.on_forget(cached.cache_clear)
    for rank, isa in enumerate(reversed(ISAS), start=1):
        for op in ("bipolar_linear", "bipolar_linear_a8", "bipolar_linear_many", "bipolar_linear_a8_many", "decode_attention"):
            OPS[op].register(_provider(op, isa, rank))
        kv.register(isa, rank, ensure, supports)
        kv_formats.register(isa, rank, ensure)
        lowrank.register(isa, rank, ensure)
        lowrank_bipolar.register(isa, rank, ensure)
        segments.register(isa, rank, ensure)
        for op in monarch.OPS:
            OPS[op].register(_monarch(op, isa, rank))
    nm.register(ensure)
    skip.register(ensure)
    pie.register(ensure)
